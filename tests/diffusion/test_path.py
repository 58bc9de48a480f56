import math

import numpy as np
import pytest
import torch

from ds_tokimg.choices import TIMESTEPS
from ds_tokimg.diffusion.path import (
    TimestepSampler,
    add_noise_to_timestep,
    alpha_sigma,
    bound_range,
    information_rate,
    log_snr,
    readable_band,
    timestep_of_log_snr,
)


def mutual_information(radix: int, log_snr_value: float) -> float:
    """I(digit; z) in nats of a uniform digit in z = level + noise, from the entropy of the mixture on a fine grid."""
    levels, deviation = np.linspace(-1, 1, radix), math.exp(-0.5 * log_snr_value)
    z = np.linspace(-1 - 9 * deviation, 1 + 9 * deviation, 6 * int(2 / deviation + 18))
    density = np.exp(-0.5 * ((z[:, None] - levels) / deviation) ** 2).mean(1) / (deviation * math.sqrt(2 * math.pi))
    entropy = -np.trapezoid(density * np.log(np.maximum(density, 1e-300)), z)
    return entropy - 0.5 * math.log(2 * math.pi * math.e * deviation**2)


def test_noising_path():
    rng = np.random.default_rng(0)
    clean, noise = rng.uniform(-1, 1, (3, 3, 8, 8)), rng.normal(size=(3, 3, 8, 8))
    t = torch.tensor([0, 250, 999])
    noisy, returned = add_noise_to_timestep(torch.tensor(clean).float(), t, torch.tensor(noise).float())
    for i, step in enumerate(t.tolist()):
        expected = (1 - step / 1000) * clean[i] + step / 1000 * noise[i]
        np.testing.assert_allclose(noisy[i].numpy(), expected, atol=1e-6)
    assert torch.equal(noisy[0], torch.tensor(clean[0]).float())
    np.testing.assert_array_equal(returned.numpy(), noise.astype(np.float32))


def test_noise_is_standard_normal_and_kept():
    torch.manual_seed(0)
    clean, t = torch.zeros(4, 3, 64, 64), torch.full((4,), 500)
    noisy, noise = add_noise_to_timestep(clean, t)
    assert torch.equal(noisy, 0.5 * noise)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.02


def test_a_level_for_every_patch():
    clean, noise = torch.rand(2, 3, 5), torch.randn(2, 3, 5)
    t = torch.tensor([[0.0, 10.0, 400.0], [999.0, 0.5, 3.0]])
    noisy, _ = add_noise_to_timestep(clean, t, noise)
    for i in range(2):
        for j in range(3):
            alone, _ = add_noise_to_timestep(clean[i, j][None], t[i, j][None], noise[i, j][None])
            torch.testing.assert_close(noisy[i, j], alone[0], atol=0, rtol=0)


def test_log_snr_and_its_inverse():
    t = torch.tensor([0.05, 1.0, 20.0, 500.0, 980.0, 999.0])
    expected = [2 * math.log((1 - s / 1000) / (s / 1000)) for s in t.tolist()]
    np.testing.assert_allclose(log_snr(t).numpy(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(timestep_of_log_snr(log_snr(t)), t, rtol=1e-4, atol=1e-3)
    value = torch.linspace(-14, 14, 57, dtype=torch.float64)
    torch.testing.assert_close(log_snr(timestep_of_log_snr(value)).double(), value, rtol=0, atol=2e-3)
    assert torch.isfinite(log_snr(torch.tensor([0, 999]))).all()
    alpha, sigma = alpha_sigma(torch.arange(1000))
    assert alpha.dtype == torch.float32 and torch.allclose(alpha + sigma, torch.ones(1000))


@pytest.mark.parametrize(("radix", "tolerance"), [(2, 1e-3), (3, 1e-3), (8, 1e-3), (16, 1e-3), (54, 0.02), (256, 0.02)])
def test_information_rate_is_the_slope_of_the_mutual_information(radix, tolerance):
    """I-MMSE: dI/d(log SNR) = SNR/2 mmse; for a large radix a few levels stand for all, which costs accuracy."""
    step = 0.02
    for value in np.linspace(-4, 2 * math.log(2.5 * (radix - 1)), 9):
        slope = (mutual_information(radix, value + step) - mutual_information(radix, value - step)) / (2 * step)
        assert abs(float(information_rate(radix, value)) - slope) <= tolerance * max(slope, 0.05), value


@pytest.mark.parametrize("radix", [2, 3, 16, 54, 64, 256])
def test_band_holds_all_but_one_percent_of_a_digit(radix):
    band = readable_band(radix)
    low = mutual_information(radix, band.low) / math.log(radix)
    high = mutual_information(radix, band.high) / math.log(radix)
    assert 0.003 < low < 0.007 and 0.993 < high < 0.997
    whole = bound_range(radix)
    assert whole.low < band.low and band.high < whole.high
    assert mutual_information(radix, whole.high) / math.log(radix) > 1 - 1e-6


@pytest.mark.parametrize("kind", [kind for kind in TIMESTEPS if kind != "noisy"])
@pytest.mark.parametrize("radix", [2, 54])
def test_density_integrates_to_one_and_matches_the_draws(kind, radix):
    sampler = TimestepSampler(kind, radix)
    band = sampler.band
    ends = (band.low, band.high) if kind == "band" else (-20.0, 20.0)
    edges = torch.linspace(*ends, 21, dtype=torch.float64)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    if kind == "uniform":
        t = sampler(u)
        assert torch.equal(t.unique(), torch.arange(1000.0)) and (torch.bincount(t.long()) == 100).all()
        # Whole steps stand for the interval up to the next: spread them for the comparison with a density.
        t = t + torch.rand(t.shape, generator=torch.Generator().manual_seed(0))
    else:
        t = sampler(u)
    assert t.dtype == torch.float32 and (t >= 0).all() and (t < 1000).all()
    drawn = torch.histc(log_snr(t).double().clamp(*ends), 20, *ends) / len(t)
    fine = torch.linspace(*ends, 20_001, dtype=torch.float64)
    density = sampler.density(timestep_of_log_snr(fine)).double()
    total = torch.trapezoid(density, fine)
    assert abs(total - 1) < 2e-3
    for k in range(20):
        inside = (fine >= edges[k]) & (fine <= edges[k + 1])
        share = torch.trapezoid(density[inside], fine[inside])
        assert abs(share - drawn[k]) < 2e-3, (k, share, drawn[k])


def test_noisy_draws_are_the_band_and_its_end():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    noisy, band = TimestepSampler("noisy", 16), TimestepSampler("band", 16)
    t = noisy(u)
    assert (t[:750] == t[0]).all() and float(log_snr(t[0])) == pytest.approx(band.band.low, abs=1e-4)
    torch.testing.assert_close(t[750:], band((u[750:] - 0.75) * 4))
    assert noisy.elbo_weight(t[0]) == 0
    torch.testing.assert_close(noisy.elbo_weight(t[760:]), 4 * band.elbo_weight(t[760:]))


def test_draws_stay_inside_the_path():
    extremes = torch.tensor([0.0, 1e-300, 1 - 2**-53], dtype=torch.float64)
    for kind in TIMESTEPS:
        for u in (extremes, extremes.float().clamp(max=1 - 2**-24)):
            t = TimestepSampler(kind, 54)(u)
            assert ((t >= 0) & (t < 1000)).all(), kind


@pytest.mark.parametrize("kind", TIMESTEPS)
def test_elbo_weight(kind):
    sampler = TimestepSampler(kind, 16)
    inside = timestep_of_log_snr(torch.linspace(-2.0, 7.0, 19))
    expected = 0.5 * ((1000 - inside) / inside) ** 2 / sampler.density(inside)
    if kind == "noisy":  # a quarter of the draws stands for the band
        expected = 4 * expected
    torch.testing.assert_close(sampler.elbo_weight(inside), expected, rtol=1e-3, atol=0)
    outside = torch.tensor([0.0, 1.0, 999.0, 1000.0])  # log-SNR 23, 13.8, -13.8, -23: nothing of the integral
    assert (sampler.elbo_weight(outside) == 0).all()


def test_unknown_timesteps():
    with pytest.raises(ValueError, match="unknown timesteps 'cosine'; available: band, uniform, entropic"):
        TimestepSampler("cosine", 16)
