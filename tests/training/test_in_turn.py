"""Tokens that are predicted and drawn one after another."""

import numpy as np
import pytest
import torch
from torch import nn

from ds_tokimg.diffusion.path import add_noise_to_timestep
from ds_tokimg.inference.sampler import SamplingOptions, sample
from ds_tokimg.model.context import Drawn, Patches, TeacherForced, WholeImage
from ds_tokimg.model.layers import InTurn, Neighbours
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.objective import TrainingLoss
from tests.support.tiny import layout_of, maker_of, random_texts, tiny_model

CODEC = TokenCodec(50)
LENGTHS = [64, 30, 5]


def patches_of(model, t=600.0, prompts=False):
    """Clean and noisy patches of texts, their ids and masks, a timestep for each text, and prompts."""
    layout = layout_of(model)
    ids, mask = layout.pack(random_texts(50, LENGTHS).texts)
    clean = model.codec.codebook[ids].flatten(2)
    noisy, _ = add_noise_to_timestep(clean, torch.full((len(ids),), t), torch.randn(clean.shape))
    condition = None
    if prompts:
        prompt, prompt_mask = layout.pack(random_texts(50, [9, 0, 4], seed=1).texts)
        condition = model.codec.codebook[prompt].flatten(2), prompt_mask
    return clean, noisy, ids, mask, torch.full((len(ids),), t), condition


# ---- what is heard ----


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_token_hears_without_noise_what_was_drawn_before_it(in_blocks):
    """One by one: what is earlier in its run, on either side, in texts that are drawn in turn; a block begins a run."""
    neighbours = Neighbours(reach=2, features=3, outputs=5)
    nn.init.normal_(neighbours.output.weight)
    tokens, clean = torch.randn(2, 60, 3), torch.randn(2, 60, 3)
    blocks = torch.arange(60) // 20 if in_blocks else torch.zeros(60)
    turns = torch.arange(60) % (20 if in_blocks else 60) % 16

    def heard(row: int, i: int, j: int) -> torch.Tensor:
        if not 0 <= j < 60 or blocks[j] > blocks[i]:
            return torch.zeros(3)
        is_known = blocks[j] < blocks[i] or (row == 1 and turns[j] < turns[i])
        return (clean if is_known else tokens)[row, j]

    rows = [[torch.cat([heard(row, i, i + d) for d in (-2, -1, 1, 2)]) for i in range(60)] for row in (0, 1)]
    expected = neighbours.output(torch.stack([torch.stack(row) for row in rows]))
    in_turn = InTurn(clean, torch.tensor([False, True]))
    options = {"context": (clean, blocks) if in_blocks else None, "in_turn": in_turn}
    torch.testing.assert_close(neighbours(tokens, **options), expected)
    wanted = slice(2, None, 16)
    torch.testing.assert_close(neighbours(tokens, **options, wanted=wanted), expected[:, wanted])


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("posterior", ["tokens", "tree"])
def test_turn_by_turn_is_what_training_predicts_at_once(posterior, prompts):
    model = tiny_model(CODEC, patch_size=2, posterior=posterior, in_turn=True)
    _, noisy, ids, mask, t, condition = patches_of(model, prompts=prompts)
    together = model.predict(Patches(noisy, t, mask), WholeImage(condition), Drawn(ids)).logits
    prediction = model.predict(Patches(noisy, t, mask), WholeImage(condition))
    for turn in range(16):
        is_known = (torch.arange(ids[0].numel()) % 16 < turn).view(ids[0].shape)
        logits = prediction.logits_in_turn(turn, torch.where(is_known, ids, 0))
        torch.testing.assert_close(logits, together.flatten(1, 2)[:, turn::16])
    assert (together - prediction.logits)[mask].abs().amax() > 0.1  # which tokens were drawn matters


@pytest.mark.parametrize("block_size", [1, 3, 6])
def test_from_left_to_right_turn_by_turn_is_what_training_predicts_at_once(block_size):
    model = tiny_model(CODEC, patch_size=2, noisy_depth=1, in_turn=True)
    clean, noisy, ids, mask, t, condition = patches_of(model, prompts=True)
    places = torch.arange(clean.shape[1])
    blocks = places // block_size
    seen = TeacherForced(clean, blocks, condition)
    together = model.predict(Patches(noisy, t, mask), seen, Drawn(ids)).logits
    cache, positions = model.empty_cache(mask), places.expand(3, -1)
    model.prefill(cache, *condition)
    for first in range(0, len(places), block_size):
        now = slice(first, first + block_size)
        prediction = model.predict(Patches(noisy[:, now], t, mask[:, now], positions[:, now]), cache)
        for turn in range(min(16, mask[0, now].numel())):
            here = mask[:, now].flatten(1)[:, turn::16]
            expected = together[:, now].flatten(1, 2)[:, turn::16]
            logits = prediction.logits_in_turn(turn, ids[:, now])
            torch.testing.assert_close(logits[here], expected[here], atol=1e-4, rtol=1e-4)
        model.prefill(cache, clean[:, now], mask[:, now], positions[:, now])


def test_a_token_knows_none_that_is_drawn_after_it():
    """The chain rule: the log-probabilities of a text's tokens add up to one of the text."""
    model = tiny_model(CODEC, patch_size=2, in_turn=True)
    _, noisy, ids, mask, t, _ = patches_of(model)
    patches = Patches(noisy, t, mask)
    before = model.predict(patches, drawn=Drawn(ids)).logits
    turns = torch.arange(ids[0].numel()) % 16
    for turn in range(16):
        other = torch.where((turns == turn).view(ids[0].shape), (ids + 1) % 50, ids)
        changed = (model.predict(patches, drawn=Drawn(other)).logits != before).any(-1).flatten(1)
        # Two tokens on either side hear it, those of a later turn.
        assert changed[0].nonzero().flatten().tolist() == [
            place
            for place in range(len(turns))
            if turns[place] > turn and (turns[max(0, place - 2) : place + 3] == turn).any()
        ]


def test_only_some_texts_are_predicted_in_turn():
    model = tiny_model(CODEC, patch_size=2, in_turn=True)
    _, noisy, ids, mask, t, _ = patches_of(model)
    rows = torch.tensor([True, False, True])
    patches = Patches(noisy, t, mask)
    mixed = model.predict(patches, drawn=Drawn(ids, rows)).logits
    in_turn, plain = (model.predict(patches, drawn=drawn).logits for drawn in (Drawn(ids), None))
    torch.testing.assert_close(mixed, torch.where(rows.view(3, 1, 1, 1), in_turn, plain))


# ---- which models ----


@pytest.mark.parametrize(
    ("options", "can"),
    [
        ({}, True),
        ({"posterior": "tree"}, True),
        ({"posterior": "digits"}, False),
        ({"neighbours": 0}, False),
        ({"head": "linear"}, False),
        ({"patch_size": 1}, False),
    ],
)
def test_tokens_are_drawn_in_turn_where_they_share_a_patch_and_hear_each_other(options, can):
    assert tiny_model(CODEC, in_turn=None, **options).config.in_turn == can
    assert not tiny_model(CODEC, **options).config.in_turn  # models of before have not learnt it
    if not can:
        with pytest.raises(ValueError, match="in_turn is for patches of several tokens"):
            tiny_model(CODEC, in_turn=True, **options)


# ---- training ----


def module_and_batch(in_turn=0.5, patch_noise=0.5, block_size=0):
    model = tiny_model(CODEC, patch_size=2, in_turn=True, block_size=block_size)
    module = TrainingLoss(model, timesteps="noisy" if block_size == 1 else "band")
    maker = maker_of(module, patch_noise=patch_noise, in_turn=in_turn)
    return module, maker(random_texts(50, [64, 30, 5, 60, 61, 64]), np.arange(6), np.arange(6), epoch=0)


@pytest.mark.parametrize(("share", "rows"), [(0.5, [1, 3, 5]), (1.0, [0, 1, 2, 3, 4, 5]), (1 / 3, [2, 5])])
def test_a_share_of_the_samples(share, rows):
    _, batch = module_and_batch(in_turn=share)
    assert batch.in_turn.nonzero().flatten().tolist() == rows


def test_progress_leaves_out_what_is_predicted_in_turn():
    module, batch = module_and_batch(patch_noise=0.0)
    module.measure_bound = True
    elbo = TrainingLoss(module.model, "elbo")(batch, per_patch=True)["loss"]
    result = module(batch)
    assert result["bound_tokens"] == 64 + 5 + 61
    assert float(result["bound_nats"]) == pytest.approx(float(elbo[[0, 2, 4]].sum().detach()), rel=1e-5)


def test_progress_of_single_patches_is_that_of_drawing_their_tokens_at_full_noise():
    module, batch = module_and_batch(in_turn=1.0, patch_noise=0.0, block_size=1)
    module.measure_bound = True
    result = module(batch)
    noisiest = batch.t > module.model.noisiest - 1e-2
    nats = module(batch, per_patch=True)["nats"][noisiest]
    assert result["bound_tokens"] == batch.mask[noisiest].sum() > 0
    assert float(result["bound_nats"]) == pytest.approx(float(nats.sum().detach()), rel=1e-5)


# ---- drawing ----


@pytest.mark.parametrize(("block_size", "evaluations"), [(0, 64), (1, 1), (4, 1), (5, 64)])
def test_a_run_alone_is_drawn_in_one_step(block_size, evaluations):
    model = tiny_model(CODEC, patch_size=2, in_turn=True).eval()
    times, original = [], model.predict
    model.predict = lambda patches, *a: times.append(float(patches.t[0])) or original(patches, *a)
    sample(model, [4], SamplingOptions(block_size=block_size))
    assert len(times) == evaluations


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance_and_given_tokens_hold_in_turn_too(scale):
    """Guidance mixes the logits of every turn; known tokens are drawn as what they are."""
    model = tiny_model(CODEC, patch_size=2, in_turn=True).eval()
    prompts, given = [[1, 2, 3], [4]], [{0: 7, 2: 8}, {5: 9}]
    options = SamplingOptions(steps=3, guidance_scale=scale)
    texts, invalid = sample(model, [11, 6], options, prompts, given)
    assert texts[0][0] == 7 and texts[0][2] == 8 and texts[1][5] == 9 and invalid == 0
    apart = [sample(model, [11], options, prompts[:1], given[:1])[0][0], texts[0]]
    assert apart[0] == apart[1]  # whatever else is in the batch
    other = sample(model, [11, 6], options, [[1, 2, 4], [4]], given)[0]
    assert (other[0] == texts[0]) == (scale == 0.0)
