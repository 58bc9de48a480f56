import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from ds_tokimg.choices import OBJECTIVES
from ds_tokimg.data.batch import Prompt
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.diffusion.path import add_noise_to_timestep
from ds_tokimg.model.context import Patches
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.objective import TrainingLoss, masked_loss
from tests.support.tiny import layout_of, maker_of, random_texts, tiny_model

CODEC = TokenCodec(50)
KINDS = [
    ("ce", {"posterior": "tokens"}),
    ("ce", {"posterior": "digits"}),
    ("ce", {"posterior": "tree"}),
    ("elbo", {"posterior": "tree"}),
    ("elbo", {"posterior": "tokens"}),
    ("mse", {"posterior": "digits"}),
    ("mse", {"head": "linear"}),
]
LENGTHS = [256, 100, 33, 32, 7, 1]


def module_and_batch(objective="ce", timesteps="band", patch_noise=0.5, conditions=True, block_size=0, **options):
    """A module of random weights, and a function from sample indices to their batch."""
    model = tiny_model(CODEC, block_size=block_size, **options)
    module = TrainingLoss(model, objective, timesteps)
    texts = random_texts(50, LENGTHS, [3, 0, 20, 60, 1, 2])
    maker = maker_of(module, patch_noise=patch_noise, condition_drop=0.2 if conditions else None)
    return module, lambda indices: maker(texts, indices, indices, epoch=0)


def gradients(module):
    result = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad(set_to_none=False)
    return result


def test_masked_loss_is_the_reference_formula_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.3, 1.0):
        clean_pred, clean = torch.randn(2, 4, 3, 64, 64, generator=generator)
        mask = (torch.rand(4, 64, 64, generator=generator) < share).float()
        reference = ((clean_pred - clean) ** 2 * mask[:, None]).sum() / (mask[:, None].sum() + 1e-8)
        assert torch.equal(masked_loss(clean_pred, clean, mask), reference)
        exact = ((clean_pred.double() - clean.double()) ** 2 * mask[:, None]).sum() / max(1.0, float(mask.sum()))
        assert float(reference) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize("head", [{"posterior": "tokens"}, {"posterior": "digits"}, {"head": "linear"}])
def test_mse_is_the_masked_loss_of_the_images(head, layout):
    """The trainer works on patches; on images, with the public functions, the same must come out."""
    module, batch_of = module_and_batch("mse", layout=layout, conditions=False, patch_noise=0, **head)
    batch = batch_of(range(len(LENGTHS)))
    texts = random_texts(50, LENGTHS).texts
    images, masks = zip(*(CODEC.encode(text, 16, layout) for text in texts), strict=True)
    clean, mask = torch.stack(images), torch.stack(masks)
    noise = torch.zeros(len(texts), 16, 48)
    noise[:, : batch.noise.shape[1]] = batch.noise
    noisy, _ = add_noise_to_timestep(clean, batch.t, module.model.unpatchify(noise))
    expected = masked_loss(module.model(noisy, batch.t, condition=None, mask=mask), clean, mask)
    result = module(batch)["loss_sum"] / module.count(batch)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
    assert module.count(batch) == mask.sum()


@pytest.mark.parametrize("posterior", ["tokens", "digits"])
def test_objectives_by_their_formulas(posterior):
    module, batch_of = module_and_batch(conditions=False, posterior=posterior)
    batch = batch_of([0, 1, 2])
    model, mask, t = module.model, batch.mask, batch.t
    clean = CODEC.codebook[batch.ids].flatten(2)
    noisy = (1 - t / 1000)[..., None] * clean + (t / 1000)[..., None] * batch.noise
    prediction = model.predict(Patches(noisy, t, mask))
    squared_error = ((prediction.clean - clean) ** 2).unflatten(-1, (16, 3)).sum(-1) * mask
    band = module.timesteps.band
    snr = ((1 - t / 1000) / (t / 1000)) ** 2
    if posterior == "tokens":
        log_p = Categorical(logits=prediction.logits).log_prob(batch.ids)
    else:
        digits = torch.stack([batch.ids // 4**k % 4 for k in range(3)], -1)
        log_p = Categorical(logits=prediction.logits).log_prob(digits).sum(-1)
    expected = {
        "mse": squared_error.sum(),
        "elbo": (squared_error * (0.5 * snr * (band.high - band.low))[..., None]).sum(),
        "ce": -(log_p * mask).sum(),
    }
    for objective in OBJECTIVES:
        result = TrainingLoss(model, objective)(batch)["loss_sum"]
        torch.testing.assert_close(result, expected[objective], rtol=1e-4, atol=0)


def test_elbo_in_expectation_is_the_bound_without_context():
    """Uniform tokens of a full code and a reader without context: the integral is the information in what the
    timesteps cover, all of log V for uniform ones and all but one percent for the band."""
    codec = TokenCodec(64)
    model = tiny_model(codec, trained=False)
    texts = random_texts(64, [256] * 64)
    for timesteps, share in (("band", 0.99), ("uniform", 1.0), ("noisy", 0.99)):
        module = TrainingLoss(model, "elbo", timesteps)
        maker = maker_of(module, seed=1)
        batch = maker(texts, range(64), range(64), 0)
        nats = module(batch)["loss_sum"].item() / batch.mask.sum().item()
        assert nats == pytest.approx(share * math.log(64), rel=0.05)


@pytest.mark.parametrize(("objective", "head"), KINDS)
def test_micro_batches_sum_to_the_whole(objective, head):
    module, batch_of = module_and_batch(objective, **head)
    whole = batch_of(range(6))
    result = module(whole)
    result["loss_sum"].backward()
    expected = gradients(module)
    parts = [batch_of(part) for part in ([0], [1, 2], [], [3, 4, 5])]
    sums = []
    for part in parts:
        output = module(part)
        output["loss_sum"].backward()
        sums.append(output)
    torch.testing.assert_close(sum(s["loss_sum"] for s in sums), result["loss_sum"], rtol=1e-5, atol=0)
    assert sum(module.count(part) for part in parts) == module.count(whole) == sum(LENGTHS)
    assert sum(int(s["valid_tokens"]) for s in sums) == int(result["valid_tokens"]) == sum(LENGTHS)
    difference = gradients(module) - expected
    assert difference.norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("bucket", [True, False])
def test_batches_by_length_have_the_loss_of_texts_alone(bucket):
    """Whatever texts a batch is made of, each adds to the loss what it does unpadded."""
    lengths = np.random.default_rng(3).integers(1, 250, 24)
    model = tiny_model(CODEC)
    module, texts = TrainingLoss(model), random_texts(CODEC.vocab_size, lengths)
    maker = maker_of(module, patch_noise=0.5)
    batches = TrainBatchSampler(lengths, 6, seed=0, bucket=bucket).batches(0)
    positions = np.arange(24).reshape(4, 6)
    together, alone, patches = [], [], 0
    for indices, places in zip(batches, positions, strict=True):
        batch = maker(texts, indices, places, 0)
        patches += batch.mask.shape[0] * batch.mask.shape[1]
        together.append(module(batch)["loss_sum"])
        each = (maker(texts, indices[i : i + 1], places[i : i + 1], 0) for i in range(6))
        alone.append(sum(module(one)["loss_sum"] for one in each))
    torch.testing.assert_close(torch.stack(together), torch.stack(alone), rtol=1e-5, atol=0)
    needed = int(layout_of(model).num_patches(lengths).sum())
    assert needed < patches and (patches < 1.4 * needed) == bucket


@pytest.mark.parametrize(("objective", "head"), KINDS)
def test_padding_has_no_influence(objective, head):
    module, batch_of = module_and_batch(objective, **head)
    batch = batch_of(range(6))
    loss = module(batch)["loss_sum"]
    loss.backward()
    expected = gradients(module)
    valid, prompt = batch.mask, batch.prompt
    other = batch.replace(
        ids=torch.where(valid, batch.ids, 49),
        noise=torch.where(valid.repeat_interleave(3, -1), batch.noise, 50.0),
        t=torch.where(valid.any(-1), batch.t, 3.0),
        prompt=Prompt(torch.where(prompt.mask, prompt.ids, 49), prompt.mask),
    )
    changed = module(other)["loss_sum"]
    torch.testing.assert_close(changed, loss, rtol=1e-6, atol=0)
    changed.backward()
    assert (gradients(module) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("timesteps", ["band", "uniform"])
@pytest.mark.parametrize("patch_noise", [0.0, 0.5])
@pytest.mark.parametrize(("objective", "head"), KINDS)
def test_an_empty_micro_batch_contributes_exactly_nothing(objective, head, patch_noise, timesteps):
    module, batch_of = module_and_batch(objective, timesteps, patch_noise, **head)
    module.measure_bound = True
    batch = batch_of([])
    result = module(batch)
    result["loss_sum"].backward()
    assert module.count(batch) == 0
    assert all(result[name] == 0 for name in ("loss_sum", "valid_tokens", "bound_nats", "bound_tokens"))
    assert not gradients(module).any()


@pytest.mark.parametrize(("objective", "head"), KINDS)
def test_sums_per_patch(objective, head):
    module, batch_of = module_and_batch(objective, **head)
    batch = batch_of(range(6))
    rows = module(batch, per_patch=True)
    torch.testing.assert_close(rows["loss"].sum().float(), module(batch)["loss_sum"].detach(), rtol=1e-5, atol=0)
    for i in range(6):
        alone = module(batch_of([i]), per_patch=True)
        for name, value in rows.items():
            own = alone[name].shape[1]
            torch.testing.assert_close(alone[name][0], value[i, :own], rtol=1e-4, atol=1e-6)
            assert not value[i, own:].any()
    tokens = batch.mask.sum(-1)
    assert (rows["correct"] <= tokens).all() and (rows["invalid"] <= tokens).all()


def test_reading_is_counted():
    """With hardly any noise all tokens are read; digits of no token are counted as invalid."""
    module, batch_of = module_and_batch(conditions=False, posterior="digits")
    with torch.no_grad():
        for parameter in module.model.head.parameters():
            parameter.zero_()
    batch = batch_of(range(6))
    batch = batch.replace(t=torch.full_like(batch.t, 2.0))
    rows = module(batch, per_patch=True)
    assert rows["correct"].sum(1).tolist() == LENGTHS and not rows["invalid"].any()
    with torch.no_grad():  # every digit the highest: code 63 of 50 tokens
        module.model.head.output.bias.view(-1, 4)[:, 3] = 1e6
    rows = module(batch, per_patch=True)
    assert rows["invalid"].sum(1).tolist() == LENGTHS


def test_progress_measures_the_samples_with_one_level():
    module, batch_of = module_and_batch("ce", conditions=False)
    module.measure_bound = True
    batch = batch_of(range(6))
    result = module(batch)
    assert not result["bound_nats"].requires_grad
    levels = [batch.t[i, batch.mask[i].any(-1)] for i in range(6)]  # of the patches that hold tokens
    whole = [i for i in range(6) if (levels[i] == levels[i][0]).all()]
    assert 0 < len(whole) < 6
    elbo = TrainingLoss(module.model, "elbo")(batch, per_patch=True)["loss"]
    assert result["bound_tokens"] == sum(LENGTHS[i] for i in whole)
    assert float(result["bound_nats"]) == pytest.approx(float(elbo[whole].sum().detach()), rel=1e-5)
    assert result["slots"] == batch.mask.numel()


def test_progress_from_left_to_right():
    """One level a block is the bound's path; patches with levels of their own within a block are not."""
    module, batch_of = module_and_batch("ce", conditions=False, patch_noise=0.5, block_size=2)
    module.measure_bound = True
    batch = batch_of(range(6))
    whole = [0, 2, 4, 5]  # every second sample, and one of a single patch
    elbo = TrainingLoss(module.model, "elbo")(batch, per_patch=True)["loss"]
    result = module(batch)
    assert result["bound_tokens"] == sum(LENGTHS[i] for i in whole)
    assert float(result["bound_nats"]) == pytest.approx(float(elbo[whole].sum().detach()), rel=1e-5)


def one_token_a_patch(posterior: str, timesteps: str = "noisy"):
    """A module that writes one token at a time, and a batch."""
    codec = TokenCodec(50, token_size=2)
    model = tiny_model(codec, posterior=posterior, patch_size=2, noisy_depth=1, block_size=1)
    module = TrainingLoss(model, timesteps=timesteps)
    maker = maker_of(module)
    return module, maker(random_texts(50, [64, 20, 3]), np.arange(3), np.arange(3), epoch=0)


@pytest.mark.parametrize("posterior", ["tokens", "tree"])
def test_progress_of_tokens_alone_is_that_of_drawing_them_at_full_noise(posterior):
    module, batch = one_token_a_patch(posterior)
    module.measure_bound = True
    result = module(batch)
    noisiest = (batch.t > module.model.noisiest - 1e-2) & batch.mask[..., 0]
    assert 0.6 < noisiest.sum() / batch.mask.sum() < 0.9
    nats = module(batch, per_patch=True)["nats"]
    assert result["bound_tokens"] == noisiest.sum()
    assert float(result["bound_nats"]) == pytest.approx(float(nats[noisiest].sum()), rel=1e-5)


@pytest.mark.parametrize("posterior", ["tokens", "tree", "digits"])
def test_sums_without_the_mean(posterior):
    """The same, but for what the mean is needed for."""
    module, batch = one_token_a_patch(posterior)
    with torch.no_grad():
        rows, fewer = module(batch, per_patch=True), module(batch, per_patch=True, with_mean=False)
    assert set(rows) - set(fewer) == {"squared_error"}
    for name in ("loss", "nats", "invalid"):
        torch.testing.assert_close(fewer[name], rows[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("objective", "head"), KINDS)
def test_autocast_is_close_and_quiet(objective, head):
    module, batch_of = module_and_batch(objective, **head)
    batch = batch_of(range(6))
    plain = module(batch)["loss_sum"].item()
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        mixed = module(batch)["loss_sum"]
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(("objective", "head"), KINDS)
def test_half_precision_weights_give_a_float32_loss(objective, head):
    """As in an engine with bf16: it casts parameters and floating-point buffers; colours and noise stay exact."""
    module, batch_of = module_and_batch(objective, **head)
    batch = batch_of(range(6))
    plain = module(batch)["loss_sum"].item()
    half = module.bfloat16()
    result = half(batch)["loss_sum"]
    assert result.dtype == torch.float32 and result.item() == pytest.approx(plain, rel=0.02)
    clean = half.colours(batch.ids)
    torch.testing.assert_close(clean, CODEC.codebook[batch.ids].flatten(2), atol=1e-6, rtol=0)


def test_colours_are_those_of_the_codec():
    codec = TokenCodec(300, token_size=2, palette=np.random.default_rng(0).permutation(300))
    module = TrainingLoss(tiny_model(codec))
    ids = torch.arange(300).view(1, 75, 4)
    torch.testing.assert_close(module.colours(ids), codec.codebook[ids].flatten(2), atol=1e-6, rtol=0)


def test_wrong_objectives():
    with pytest.raises(ValueError, match="unknown objective 'mae'; available: ce, elbo, mse"):
        TrainingLoss(tiny_model(CODEC), "mae")
    with pytest.raises(ValueError, match="ce needs head posterior"):
        TrainingLoss(tiny_model(CODEC, head="linear"), "ce")
