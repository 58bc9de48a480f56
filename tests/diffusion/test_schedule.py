"""Noise levels that are learnt: where they lie, what they depend on, and that nothing of them is lost."""

import json
import math

import numpy as np
import pytest
import torch

from ds_tokimg.diffusion.path import Band, TimestepSampler, log_snr, timestep_of_log_snr
from ds_tokimg.diffusion.schedule import BINS, PREFIXES, UNIFORM_SHARE, EntropicSchedule
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.objective import TrainingLoss
from tests.support.runs import learned, metrics, small_flags, train_in_ranks, write_corpus
from tests.support.tiny import maker_of, random_texts, tiny_model

BAND = Band(-5.0, 3.0)
CODEC = TokenCodec(50)


def seen_of(curve, band=BAND) -> dict[str, float]:
    """Sums of a step in which every bin had 100 tokens, whose cross-entropy follows a curve over log-SNR."""
    middles = band.low + (np.arange(BINS) + 0.5) * (band.high - band.low) / BINS
    values = {f"{PREFIXES[0]}{i:02d}": 100 * float(curve(middles[i])) for i in range(BINS)}
    return values | {f"{PREFIXES[1]}{i:02d}": 100.0 for i in range(BINS)}


def drawn(schedule: EntropicSchedule, count: int = 200_000) -> torch.Tensor:
    """Log-SNR of learnt levels for band levels that cover the band evenly, float64 [count]."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = timestep_of_log_snr(BAND.low + (BAND.high - BAND.low) * u)
    return log_snr(schedule.warp(t)).double()


def step_at(place: float, width: float = 0.3):
    """What is unknown falls from 6 nats to none around a log-SNR."""
    return lambda value: 6 / (1 + math.exp((value - place) / width))


def test_before_anything_is_seen_it_is_the_band():
    u = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = TimestepSampler("band", 16)(u)
    schedule = EntropicSchedule(TimestepSampler("entropic", 16).band)
    torch.testing.assert_close(schedule.warp(t), t, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(schedule.density(t), TimestepSampler("band", 16).density(t))


@pytest.mark.parametrize("place", [-3.0, 0.0, 2.0])
def test_levels_are_drawn_where_the_loss_falls(place):
    schedule = EntropicSchedule(BAND)
    for _ in range(3):
        schedule.update(seen_of(step_at(place)))
    values = drawn(schedule)
    near = float(((values - place).abs() < 1.0).double().mean())
    fall = step_at(place)(place - 1) - step_at(place)(place + 1)
    assert near == pytest.approx((1 - UNIFORM_SHARE) * fall / 6 + UNIFORM_SHARE * 2 / 8, abs=0.03)
    assert (values.diff() > 0).all()  # the order of the levels stays
    assert values.min() >= BAND.low - 1e-3 and values.max() <= BAND.high + 1e-3


def test_its_density_is_that_of_what_it_draws():
    schedule = EntropicSchedule(BAND)
    schedule.update(seen_of(lambda value: 6 * math.exp(-0.5 * (value + 5))))
    counts = torch.histc(drawn(schedule), 16, BAND.low, BAND.high) / 200_000
    grid = BAND.low + (torch.arange(1600) + 0.5) * (BAND.high - BAND.low) / 1600
    density = schedule.density(timestep_of_log_snr(grid)).view(16, 100).mean(1).double()
    torch.testing.assert_close(density * 0.5, counts, atol=2e-3, rtol=0)
    assert float(density.sum() * 0.5) == pytest.approx(1.0, abs=1e-4)


def test_a_loss_that_rises_or_does_not_change_asks_for_nothing():
    for curve in (lambda value: 3.0, lambda value: value + 10):
        schedule = EntropicSchedule(BAND)
        schedule.update(seen_of(curve))
        torch.testing.assert_close(schedule.shares(), torch.full((BINS,), 1 / BINS, dtype=torch.float64))


@pytest.mark.parametrize("objective", ["ce", "elbo", "mse"])
@pytest.mark.parametrize("posterior", ["tokens", "digits"])
def test_what_is_seen_is_the_loss_however_it_is_cut(objective, posterior):
    model = tiny_model(CODEC, posterior=posterior)
    module, texts = TrainingLoss(model, objective, "entropic"), random_texts(50, [256, 100, 30, 256, 7, 200, 64, 90])
    module.schedule.update(seen_of(step_at(-1.0)))
    maker = maker_of(module, patch_noise=0.5)

    def seen(indices):
        return module(maker(texts, indices, indices, epoch=0))

    whole, parts = seen(np.arange(8)), [seen(np.arange(i, i + 2)) for i in range(0, 8, 2)]
    for name, value in whole.items():
        if name.startswith(PREFIXES):
            torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-4)
    total = [sum(float(whole[f"{prefix}{i:02d}"]) for i in range(BINS)) for prefix in PREFIXES]
    assert total[1] == sum(map(len, texts.texts))
    assert whole["loss_sum"].requires_grad
    if objective == "ce":
        assert total[0] == pytest.approx(float(whole["loss_sum"].detach()), rel=1e-5)


def test_elbo_counts_what_is_drawn_rarely_for_more():
    """In expectation the weighted error does not depend on where the levels are drawn."""
    model = tiny_model(CODEC, trained=False)
    module, texts = TrainingLoss(model, "elbo", "entropic"), random_texts(50, [256] * 400)
    maker, results = maker_of(module), []
    for moved in (False, True):
        if moved:
            module.schedule.update(seen_of(step_at(0.0, 1.0), module.schedule.band))
        with torch.no_grad():
            batch = maker(texts, np.arange(400), np.arange(400), epoch=0)
            results.append(float(module(batch)["loss_sum"]) / 400 / 256)
    assert results[0] == pytest.approx(results[1], rel=0.03) and results[0] != results[1]


def test_its_state_is_exact_as_json():
    schedule, copy = EntropicSchedule(BAND), EntropicSchedule(BAND)
    for place in (0.1, 0.7):
        schedule.update(seen_of(step_at(place)))
    copy.load_state(json.loads(json.dumps(schedule.state())))
    assert torch.equal(copy.nats, schedule.nats) and torch.equal(copy.tokens, schedule.tokens)


def test_the_linear_head_has_nothing_to_follow(tmp_path):
    with pytest.raises(ValueError, match="posterior"):
        TrainingLoss(tiny_model(CODEC, head="linear"), "mse", "entropic")


def state_of(run, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "trainer_state.json").read_text())["schedule"]


def test_a_run_moves_its_levels_and_a_resumed_one_goes_on_with_them(tmp_path):
    """Bit for bit on one rank; on two, the same up to the order of sums."""
    corpus, once, twice, two = write_corpus(tmp_path), *(tmp_path / name for name in ("once", "twice", "two"))
    entropic = ["--timesteps", "entropic", "--max_steps", "8"]
    train_in_ranks(1, small_flags(corpus, once, *entropic))
    train_in_ranks(1, small_flags(corpus, twice, *entropic[:2]))
    train_in_ranks(1, ["--resume", "latest", "--output_dir", str(twice), "--max_steps", "8"])
    assert learned(metrics(once)) == learned(metrics(twice)) and state_of(once, 8) == state_of(twice, 8)
    train_in_ranks(2, small_flags(corpus, two, *entropic, "--batch_size", "2", "--gradient_accumulation_steps", "2"))
    for name, values in state_of(two, 8).items():
        assert values == pytest.approx(state_of(once, 8)[name], rel=1e-4)
    assert [r["loss"] for r in metrics(two)] == pytest.approx([r["loss"] for r in metrics(once)], rel=1e-4)
    schedule = EntropicSchedule(BAND)
    schedule.load_state(state_of(once, 8))
    assert schedule.shares().max() > 1.5 / BINS  # levels have moved
