import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ds_tokimg.diffusion.path import TimestepSampler, add_noise_to_timestep
from ds_tokimg.model.config import JiTConfig, config_of_name, model_names
from ds_tokimg.model.context import Patches, TeacherForced, WholeImage
from ds_tokimg.model.jit import JiT
from ds_tokimg.tokens.codec import TokenCodec
from tests.support.tiny import tiny_model

CODEC = TokenCodec(50)  # radix 4
HEADS = [{"posterior": "tokens"}, {"posterior": "digits"}, {"posterior": "tree"}, {"head": "linear"}]


def images_of(lengths, codec=CODEC, layout="patch", seed=0):
    """Clean images and masks of random texts, 16 x 16."""
    rng = np.random.default_rng(seed)
    pairs = [codec.encode(rng.integers(0, codec.vocab_size, n), 16, layout) for n in lengths]
    return tuple(torch.stack(part) for part in zip(*pairs, strict=True))


def noise_like(clean, seed=1):
    return torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def noisy_images(lengths, t, **options):
    clean, mask = images_of(lengths, **options)
    return add_noise_to_timestep(clean, t, noise_like(clean))[0], mask


# ---- at the start ----


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize("posterior", ["tokens", "digits"])
def test_untrained_prediction_is_the_posterior_mean(posterior, layout):
    """The network adds nothing at first, so that Bayes' rule without context is what remains."""
    model = tiny_model(CODEC, trained=False, posterior=posterior, layout=layout)
    t = torch.tensor([900, 400, 20])
    noisy, mask = noisy_images([256, 100, 3], t, layout=layout)
    result = model(noisy, t, mask=mask)
    alpha, sigma = (1 - t.double() / 1000).view(3, 1, 1, 1, 1), (t.double() / 1000).view(3, 1, 1, 1, 1)
    if posterior == "digits":
        levels = CODEC.levels.double()
        shares = Normal(alpha * levels, sigma).log_prob(noisy.double()[..., None]).softmax(-1)
        expected = (shares * levels).sum(-1)
    else:
        book = CODEC.codebook.double().T.view(3, 1, 1, 50)
        shares = Normal(alpha * book, sigma).log_prob(noisy.double()[..., None]).sum(1, keepdim=True).softmax(-1)
        expected = (shares * book).sum(-1)
    torch.testing.assert_close(result.double(), expected * mask[:, None], atol=2e-5, rtol=0)
    assert result.shape == noisy.shape and result.dtype == torch.float32


def test_untrained_layers_are_the_identity():
    model = tiny_model(CODEC, trained=False)
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    noisy, mask = noisy_images([256], torch.tensor([300]))
    model(noisy, torch.tensor([300]), mask=mask)
    assert len(seen) == 2 and seen[0][0].abs().max() > 0
    assert all(torch.equal(before, after) for before, after in seen)


def test_every_weight_learns():
    """No parameter is without gradient in a model under way, with conditions."""
    for head in HEADS:
        model = tiny_model(CODEC, **head)
        noisy, mask = noisy_images([60, 20], torch.tensor([700, 300]))
        patches, slots = model.patchify(noisy)[:, :4], model.slot_mask(mask, noisy)[:, :4]
        condition = (patches[:, :2], slots[:, :2])
        prediction = model.predict(Patches(patches, torch.tensor([700, 300]), slots), WholeImage(condition))
        (prediction.clean**2).sum().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not silent


# ---- what is computed ----


def counted(model):
    """Numbers of positions that the first block sees, filled at each call."""
    positions = []
    model.layers[0].register_forward_hook(lambda _, inputs, output: positions.append(inputs[0].shape[1]))
    return positions


@pytest.mark.parametrize("layout", ["patch", "raster"])
def test_patches_without_a_valid_pixel_are_not_computed(layout):
    model = tiny_model(CODEC, layout=layout)
    positions = counted(model)
    for lengths in ([1], [16], [17], [40, 5], [0], [256]):
        noisy, mask = noisy_images(lengths, torch.full((len(lengths),), 500), layout=layout)
        model(noisy, torch.full((len(lengths),), 500), mask=mask)
        blocks = mask.unfold(1, 4, 4).unfold(2, 4, 4).amax((3, 4)).flatten(1)
        assert positions.pop() == max(1, int(blocks.sum(1).max()))
    model(noisy, torch.tensor([500]))
    assert positions.pop() == 16  # without a mask everything is valid


@pytest.mark.parametrize("head", HEADS)
def test_invalid_patches_and_cells_do_not_matter(head):
    model = tiny_model(CODEC, **head)
    t = torch.tensor([600, 200])
    noisy, mask = noisy_images([70, 33], t)
    result = model(noisy, t, mask=mask)
    other = torch.where(mask[:, None] > 0, noisy, 100 * noise_like(noisy, 2))
    assert torch.equal(model(other, t, mask=mask), result)
    assert not result[(mask == 0)[:, None].expand_as(result)].any()
    # whereas a valid one matters to all the others of its text, and to no other text
    other = noisy.clone()
    other[0, :, 0, 0] += 1
    change = model.patchify((model(other, t, mask=mask) - result).abs()).amax(-1)  # [B, patches]
    assert change[0, :5].min() > 1e-4 and not change[1].any()


@pytest.mark.parametrize("head", HEADS)
def test_a_text_in_a_batch_is_what_it_is_alone(head):
    model = tiny_model(CODEC, **head)
    lengths, t = [256, 100, 7, 0], torch.tensor([600, 200, 900, 5])
    noisy, mask = noisy_images(lengths, t)
    together = model(noisy, t, mask=mask)
    for i in range(4):
        alone = model(noisy[i : i + 1], t[i : i + 1], mask=mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(together).all() and not together[3].any()


def test_a_mask_with_holes_is_the_same_as_dropping_the_patches():
    """The patches that are left attend to each other at their own places, whichever others were never there."""
    model = tiny_model(CODEC)
    t = torch.tensor([400])
    noisy, _ = noisy_images([256], t)
    keep = torch.tensor([0, 3, 4, 9, 15])
    mask = model.unpatchify(torch.zeros(1, 16, 48).index_fill(1, keep, 1.0))[:, 0]
    result = model.patchify(model(noisy, t, mask=mask))[:, keep]
    slots = torch.ones(1, 5, 16, dtype=torch.bool)
    dropped = model.predict(Patches(model.patchify(noisy)[:, keep], t, slots, keep[None]))
    torch.testing.assert_close(result, dropped.clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_condition_padding_does_not_matter(head):
    model = tiny_model(CODEC, **head)
    t = torch.tensor([500, 100, 300])
    noisy, mask = noisy_images([30, 60, 20], t)
    condition, condition_mask = images_of([50, 5, 0], seed=3)
    together = model(noisy, t, condition, mask, condition_mask)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = model(noisy[rows], t[rows], condition[rows], mask[rows], condition_mask[rows])
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)
    # an empty condition is none, another one is another prediction
    torch.testing.assert_close(together[2:], model(noisy[2:], t[2:], mask=mask[2:]), atol=1e-5, rtol=1e-5)
    plain = model(noisy, t, mask=mask)
    assert (together[:2] - plain[:2]).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_condition_costs_its_own_patches():
    model = tiny_model(CODEC)
    positions = counted(model)
    noisy, mask = noisy_images([30], torch.tensor([500]))
    condition, condition_mask = images_of([17], seed=3)
    model(noisy, torch.tensor([500]), condition, mask, condition_mask)
    model(noisy, torch.tensor([500]), None, mask)
    assert positions == [2 + 2, 2]


def test_a_condition_is_shown_without_noise():
    """The prompt's noise level is 0 whatever the image's: the level of its positions does not change with t."""
    model = tiny_model(CODEC)
    seen = []
    model.layers[0].register_forward_hook(lambda _, inputs, output: seen.append(inputs[1]))
    noisy, mask = noisy_images([30], torch.tensor([500]))
    condition, condition_mask = images_of([17], seed=3)
    for t in (100, 900):
        model(noisy, torch.tensor([t]), condition, mask, condition_mask)
    assert torch.equal(seen[0][:, :2], seen[1][:, :2])
    assert not torch.equal(seen[0][:, 2:], seen[1][:, 2:])


# ---- from left to right ----


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("noisy_depth", [0, 1])
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_a_block_sees_itself_and_what_is_clean_before_it(block_size, noisy_depth, head):
    """The same as predicting each block alone, with the clean patches before it as a condition of their own places."""
    model = tiny_model(CODEC, noisy_depth=noisy_depth, **head)
    clean, mask = images_of([250, 90])
    clean, slot_mask = model.patchify(clean), model.slot_mask(mask, clean)
    t = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) * 900 + 20
    noisy, _ = add_noise_to_timestep(clean, t, noise_like(clean))
    blocks = torch.arange(16) // block_size
    together = model.predict(Patches(noisy, t, slot_mask), TeacherForced(clean, blocks)).clean
    for block in range(int(blocks[-1]) + 1):
        now, until = blocks == block, blocks <= block
        # Noise in the other blocks, clean patches in later ones and in this one: none of them may matter.
        others = torch.where(now[:, None], noisy, torch.randn_like(noisy))
        known = torch.where((blocks < block)[:, None], clean, torch.randn_like(clean))
        patches = Patches(others[:, until], torch.where(now, t, 5.0)[:, until], slot_mask[:, until])
        alone = model.predict(patches, TeacherForced(known[:, until], blocks[until]))
        torch.testing.assert_close(alone.clean[:, now[until]], together[:, now], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("noisy_depth", [0, 1])
@pytest.mark.parametrize("block_size", [1, 3])
def test_block_by_block_with_a_cache_is_all_blocks_at_once(block_size, noisy_depth, prompts):
    """What sampling computes, one block after another, is what training computes, all at once."""
    model = tiny_model(CODEC, noisy_depth=noisy_depth)
    clean, mask = images_of([250, 90])
    clean, slot_mask = model.patchify(clean), model.slot_mask(mask, clean)
    prompt, prompt_mask = clean[:, 3:6].clone(), slot_mask[:, 3:6].clone()
    prompt_mask[0, 2], prompt_mask[1] = False, False
    condition = (prompt, prompt_mask) if prompts else None
    t = torch.full((2,), 500.0)
    noisy, _ = add_noise_to_timestep(clean, t, noise_like(clean))
    blocks = torch.arange(16) // block_size
    together = model.predict(Patches(noisy, t, slot_mask), TeacherForced(clean, blocks, condition)).clean
    cache = model.empty_cache(slot_mask)
    if prompts:
        model.prefill(cache, *condition)
    positions = torch.arange(16).expand(2, 16)
    for start in range(0, 16, block_size):
        now = slice(start, start + block_size)
        place = positions[:, now]
        for _ in range(2):  # predicting does not change what is in the cache
            alone = model.predict(Patches(noisy[:, now], t, slot_mask[:, now], place), cache).clean
        valid = slot_mask[:, now].any(-1)
        torch.testing.assert_close(alone[valid], together[:, now][valid], atol=1e-4, rtol=1e-4)
        model.prefill(cache, clean[:, now], slot_mask[:, now], place)


@pytest.mark.parametrize("noisy_depth", [0, 1])
def test_earlier_blocks_matter_and_a_condition_is_seen_by_all(noisy_depth):
    model = tiny_model(CODEC, noisy_depth=noisy_depth)
    clean, mask = images_of([256])
    clean, slot_mask = model.patchify(clean), model.slot_mask(mask, clean)
    noisy, _ = add_noise_to_timestep(clean, torch.tensor([600.0]), noise_like(clean))
    prompt = (clean[:, :2], slot_mask[:, :2])

    def predict(first: float = 0.0, asked: float = 0.0) -> Tensor:
        shown = clean.clone()
        shown[:, 0] += first
        condition = (prompt[0] + asked, prompt[1])
        t = torch.full((1, 16), 600.0)
        return model.predict(Patches(noisy, t, slot_mask), TeacherForced(shown, torch.arange(16), condition)).clean

    plain = predict()
    changed = (predict(first=0.5) - plain).abs().amax((0, 2))
    assert changed[0] == 0 and (changed[1:] > 0).all()
    assert ((predict(asked=0.5) - plain).abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("options", [{"posterior": "tokens"}, {"posterior": "digits"}, {"posterior": "tree"}])
def test_the_local_window_is_two_tokens_on_either_side(options):
    """With silent layers: the tokens of the same patch, and across its border those two tokens far."""
    model = tiny_model(CODEC, local_window=2, **options)
    for layer in model.layers:
        nn.init.zeros_(layer.offset)
    for module in (model.time_embed.modulation, model.token_shift):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    clean, mask = images_of([64])
    noisy, slot_mask = model.patchify(clean), model.slot_mask(mask, clean)
    changed = noisy.clone()
    changed[:, 1, :3] = -changed[:, 1, :3]  # the first token of the second patch
    t = torch.tensor([500.0])
    pair = [model.predict(Patches(x, t, slot_mask)).logits.flatten(1, 2).flatten(2) for x in (noisy, changed)]
    differs = (pair[0] != pair[1]).any(-1)[0]
    assert differs[:16].nonzero().flatten().tolist() == [14, 15] and differs[16:32].all() and not differs[32:64].any()


@pytest.mark.parametrize(("options", "reach"), [({}, 2), ({"token_size": 4}, 0), ({"head": "linear"}, 0)])
def test_there_is_a_local_window_where_tokens_share_a_patch(options, reach):
    codec = TokenCodec(50, token_size=options.pop("token_size", 1))
    assert tiny_model(codec, **options).config.local_window == reach


def test_a_linear_head_has_no_local_window():
    with pytest.raises(ValueError, match="the linear head has none"):
        tiny_model(CODEC, head="linear", local_window=1)


# ---- noise levels and places ----


@pytest.mark.parametrize("head", HEADS)
def test_a_level_per_patch_that_is_constant_is_one_level(head):
    model = tiny_model(CODEC, **head)
    t = torch.tensor([600, 200])
    noisy, mask = noisy_images([256, 33], t)
    torch.testing.assert_close(
        model(noisy, t[:, None].expand(2, 16), mask=mask), model(noisy, t, mask=mask), atol=1e-5, rtol=1e-5
    )


def test_a_level_per_patch_belongs_to_its_patch():
    model = tiny_model(CODEC, trained=False)
    t = torch.linspace(30, 950, 16)[None]
    clean, mask = images_of([256])
    patches = model.patchify(clean)
    noisy, _ = add_noise_to_timestep(patches, t, noise_like(patches))
    result = model.patchify(model(model.unpatchify(noisy), t, mask=mask))
    for i in range(16):
        alone = model.predict(Patches(noisy[:, i : i + 1], t[:, i], torch.ones(1, 1, 16, dtype=torch.bool)))
        torch.testing.assert_close(result[:, i : i + 1], alone.clean, atol=1e-5, rtol=0)


def test_only_relative_places_matter():
    """A shuffle, on the other hand, is another text."""
    model = tiny_model(CODEC)
    t = torch.tensor([500])
    noisy, _ = noisy_images([96], t)
    patches, slots = model.patchify(noisy)[:, :6], torch.ones(1, 6, 16, dtype=torch.bool)
    places = torch.arange(6)[None]
    here = model.predict(Patches(patches, t, slots, places)).clean
    torch.testing.assert_close(model.predict(Patches(patches, t, slots)).clean, here)
    there = model.predict(Patches(patches, t, slots, places + 5)).clean
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    shuffled = model.predict(Patches(patches, t, slots, places.flip(1))).clean
    assert (shuffled - here).abs().max() > 1e-3


# ---- gradients ----


@pytest.mark.parametrize("head", HEADS)
def test_gradient_of_the_whole_is_its_slope(head):
    """Float32 throughout, hence the tolerance: the slope along the gradient against a central difference."""
    model = tiny_model(CODEC, **head)
    t = torch.tensor([600, 200])
    noisy, mask = noisy_images([70, 33], t)
    target = noise_like(noisy, 5)

    def value():
        return (model(noisy, t, mask=mask) * target).sum()

    value().backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    slope = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
    step = 1e-2 / float(slope)  # the value moves by about 1e-2 each way
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for p in parameters:
                p += sign * step * p.grad / slope
            ends.append(float(value()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slope), rel=0.02)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(CODEC, activation_checkpointing=checkpointing)
        noisy, mask = noisy_images([70], torch.tensor([300]))
        model(noisy, torch.tensor([300]), mask=mask).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- patches ----


@pytest.mark.parametrize(("token_size", "patch_size"), [(1, 4), (2, 4), (4, 8), (1, 2)])
def test_patches_hold_consecutive_tokens(token_size, patch_size):
    codec = TokenCodec(50, token_size)
    model = tiny_model(codec, patch_size=patch_size)
    ids = np.random.default_rng(0).integers(0, 50, codec.capacity(16))
    image, _ = codec.encode(ids, 16, "patch", patch_size)
    patches = model.patchify(image[None])
    expected = codec.codebook[torch.from_numpy(ids)].view(1, (16 // patch_size) ** 2, -1)
    assert torch.equal(patches, expected)
    assert torch.equal(model.unpatchify(patches), image[None])


def test_a_patch_is_valid_if_any_of_its_pixels_is():
    model = tiny_model(TokenCodec(50, token_size=2))
    mask = torch.zeros(1, 16, 16)
    mask[0, 3, 6] = 0.01  # in patch 1, its cell in the second row and column
    expected = torch.zeros(1, 16, 4, dtype=torch.bool)
    expected[0, 1, 3] = True
    assert torch.equal(model.slot_mask(mask, torch.zeros(1, 3, 16, 16)), expected)


@pytest.mark.parametrize("posterior", ["tokens", "digits", "tree"])
def test_reading_takes_the_most_likely_token(posterior):
    codec = TokenCodec(50, palette=np.random.default_rng(0).permutation(50))
    model = tiny_model(codec, trained=False, posterior=posterior)
    image, mask = codec.encode(range(50), 16)
    slots = model.slot_mask(mask[None], image[None])
    ids, invalid = model.read(model.predict(Patches(model.patchify(image[None]), torch.tensor([10]), slots)))
    assert ids[slots].tolist() == list(range(50)) and not invalid[slots].any()


# ---- names and files ----


def block_parameters(width, heads):
    """Per block: attention, SwiGLU, two norms and the learned offset of the modulation."""
    hidden = 64 * round(width * 8 / 3 / 64)
    attention = 3 * width**2 + width**2 + width + 2 * (width // heads)
    mlp = 2 * hidden * (width + 1) + width * (hidden + 1)
    return attention + mlp + 2 * width + 6 * width


@pytest.mark.parametrize(
    ("size", "depth", "width", "heads", "millions"),
    [
        ("XS", 6, 192, 6, 5.0),
        ("S", 12, 384, 6, 27),
        ("B", 12, 768, 12, 102),
        ("L", 24, 1024, 16, 332),
        ("H", 32, 1280, 16, 668),
    ],
)
def test_named_sizes(size, depth, width, heads, millions):
    for patch in (2, 4, 8):
        with torch.device("meta"):
            model = JiT.from_name(f"JiT-{size}/{patch}", TokenCodec(1024), 64)
        assert model.num_patches == (64 // patch) ** 2
        blocks = sum(p.numel() for p in model.layers.parameters())
        assert blocks == depth * block_parameters(width, heads)
        total = sum(p.numel() for p in model.parameters())
        if patch == 4:
            assert total / 1e6 == pytest.approx(millions, rel=0.05)
    assert all(name in model_names() for name in ("JiT-XS/2", "JiT-B/4", "JiT-H/8"))


def test_the_posterior_follows_the_vocabulary_and_the_tokens_of_a_patch():
    with torch.device("meta"):
        assert type(JiT.from_name("JiT-B/2", TokenCodec(151_669, token_size=2)).head).__name__ == "TreeHead"
        assert type(JiT.from_name("JiT-B/4", TokenCodec(151_669)).head).__name__ == "DigitHead"
        assert type(JiT.from_name("JiT-B/4", TokenCodec(4096)).head).__name__ == "TokenHead"


@pytest.mark.parametrize("head", HEADS)
def test_pretrained_round_trip(tmp_path, head):
    codec = TokenCodec(50, palette=np.random.default_rng(0).permutation(50))
    model = tiny_model(codec, block_size=2, **head)
    model.save_pretrained(tmp_path / "export")
    again = JiT.from_pretrained(tmp_path / "export")
    assert again.config == model.config and again.writing == model.writing and not again.training
    assert again.codec.to_dict() == codec.to_dict()
    noisy, mask = noisy_images([70], torch.tensor([300]))
    assert torch.equal(again(noisy, torch.tensor([300]), mask=mask), model(noisy, torch.tensor([300]), mask=mask))
    with pytest.raises(FileNotFoundError):
        JiT.from_pretrained(tmp_path)


def test_an_export_needs_no_deepspeed(tmp_path):
    tiny_model(CODEC).save_pretrained(tmp_path)
    program = (
        "import sys, ds_tokimg, torch; m = ds_tokimg.JiT.from_pretrained(sys.argv[1]); "
        "m(torch.zeros(1, 3, 16, 16), torch.tensor([500])); "
        "assert not {'deepspeed', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["JiT-B", "JiT-B/3", "JiT-M/4", "B/4", "jit-b/4", ""])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match=r"available: JiT-XS/2, .*JiT-H/8"):
        config_of_name(name)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"head": "softmax"}, "unknown head 'softmax'; available: posterior, linear"),
        ({"posterior": "words"}, "unknown posterior 'words'; available: auto, tokens, digits, tree"),
        ({"layout": "spiral"}, "unknown layout 'spiral'; available: patch, raster"),
        ({"img_size": 30}, "img_size 30 is not a multiple"),
    ],
)
def test_unknown_options(option, message):
    shape = {"depth": 1, "width": 16, "heads": 1, "img_size": 16}
    with pytest.raises(ValueError, match=message):
        JiT(CODEC, JiTConfig(**shape | option))


def test_noisy_patches_that_enter_late_know_what_was_read_up_to_there():
    """The block that only clean patches go through changes a noisy patch by what it makes of those before it, in the
    image or in the prompt."""
    model = tiny_model(CODEC, noisy_depth=1)
    clean, mask = images_of([256])
    clean, slot_mask = model.patchify(clean), model.slot_mask(mask, clean)
    noisy, _ = add_noise_to_timestep(clean, torch.tensor([600.0]), noise_like(clean))
    prompt = (clean[:, :2], slot_mask[:, :2])
    t = torch.full((1, 16), 600.0)

    def predict(condition=prompt):
        # Nothing but what they are shown: no attention in the block that they go through.
        nn.init.zeros_(model.layers[1].attention.out.weight)
        return model.predict(Patches(noisy, t, slot_mask), TeacherForced(clean, torch.arange(16), condition)).clean

    before, alone = predict(), predict(None)
    model.layers[0].mlp.down.weight.data.add_(0.1)
    assert ((predict() - before).abs().amax((0, 2)) > 0).all()
    changed = (predict(None) - alone).abs().amax((0, 2)) > 0
    assert not changed[0] and changed[1:].all()  # before the first there is nothing
    with pytest.raises(ValueError, match="noisy_depth is 3; the model has 2 blocks"):
        tiny_model(CODEC, noisy_depth=3)


def test_the_network_is_told_no_noise_level_that_training_has_not():
    """Sampling begins beyond, the bound goes beyond: there the network must not be asked what it has never seen."""
    model = tiny_model(CODEC)
    told = []
    model.time_embed.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    noisiest, cleanest = TimestepSampler("band", CODEC.radix)(torch.tensor([0.0, 1.0]))
    levels = torch.tensor([noisiest, 999.0, 300.0, cleanest, 0.0])
    patches, mask = torch.zeros(5, 16, model.slots * CODEC.digits_per_token), torch.ones(5, 16, model.slots) > 0
    model.predict(Patches(patches, levels, mask))
    expected = torch.tensor([noisiest, noisiest, 300.0, cleanest, cleanest])
    torch.testing.assert_close(told[0][:, 0], expected, rtol=1e-3, atol=0)
    model.predict(Patches(patches, levels, mask), WholeImage((patches, mask)))
    assert not told[2].any() or not told[1].any()  # what is shown without noise is told so
