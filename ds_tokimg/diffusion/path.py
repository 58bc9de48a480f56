"""The noising path and the choice of timesteps.

One path for training, sampling and the bound (rectified flow, Liu et al. 2022; JiT, Li & He 2025):

    noisy = (1 - t/1000) * clean + (t/1000) * noise,    t in [0, 1000): 0 is clean
    log_snr(t) = 2 log((1 - t/1000) / (t/1000))

Timesteps may be integers (the reference's) or real numbers: fine codes become readable below t = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_tokimg.choices import TIMESTEPS
from ds_tokimg.diffusion.band import bound_range, readable_band

NUM_TIMESTEPS = 1000
# The clean end of the path has no noise at all: its log-SNR is reported as that of this timestep.
MIN_TIMESTEP = 1e-2
START = 999.0  # the timestep where sampling begins
LOG_SNR_START = 2.0 * math.log((NUM_TIMESTEPS - START) / START)
# Of the draws of `noisy`, those at the noisy end of the band.
NOISY_SHARE = 0.75


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise scale of timestep t (any shape), float32: alpha = 1 - t/1000, sigma = t/1000."""
    sigma = t.float() / NUM_TIMESTEPS
    return 1.0 - sigma, sigma


def log_snr(t: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2) of timestep t, float32; finite also at t = 0 (see MIN_TIMESTEP)."""
    alpha, sigma = alpha_sigma(t.float().clamp(MIN_TIMESTEP, NUM_TIMESTEPS - MIN_TIMESTEP))
    return 2.0 * (alpha.log() - sigma.log())


def timestep_of_log_snr(value: Tensor) -> Tensor:
    """The inverse of `log_snr`: t = 1000 / (1 + exp(value / 2)), same dtype as the input."""
    return NUM_TIMESTEPS * torch.sigmoid(-0.5 * value)


def add_noise_to_timestep(clean: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Moves clean images along the noising path.

    Args:
        clean: [B, ...] in [-1, 1].
        t: timesteps in [0, 1000), [B], or any shape that broadcasts against clean from the left ([B, patches] for
            clean patches [B, patches, P]).
        noise: standard normal, shape of clean; drawn from the global generator when None.

    Returns (noisy, noise), both shaped as clean.
    """
    if noise is None:
        noise = torch.randn_like(clean)
    alpha, sigma = alpha_sigma(t.view(t.shape + (1,) * (clean.dim() - t.dim())))
    return alpha * clean + sigma * noise, noise


class TimestepSampler:
    """Turns uniform numbers in [0, 1) into timesteps, and knows the density with which it does.

    `band`: log-SNR uniform over the codec's readable band. `uniform`: integer t, uniform (the reference system).
    `entropic` begins as `band` and is then moved by `diffusion.schedule`, while samples are used. `noisy`: three
    quarters of the draws at the band's noisy end, where only the context tells a token, the others as `band`; the
    density of these two is given as that of the band.
    """

    def __init__(self, kind: str, radix: int):
        if kind not in TIMESTEPS:
            raise ValueError(f"unknown timesteps {kind!r}; available: {', '.join(TIMESTEPS)}")
        self.kind = kind
        self.band, self.bound_range = readable_band(radix), bound_range(radix)

    def __call__(self, u: Tensor) -> Tensor:
        """u in [0, 1), float64 or float32, any shape -> timesteps in [0, 1000), float32."""
        if self.kind == "uniform":
            return (u * NUM_TIMESTEPS).floor().float()
        if self.kind == "noisy":
            u = ((u - NOISY_SHARE) / (1 - NOISY_SHARE)).clamp(min=0)
        value = self.band.low + (self.band.high - self.band.low) * u
        return timestep_of_log_snr(value).float()

    def density(self, t: Tensor) -> Tensor:
        """Probability density of log-SNR at timestep t (any shape), float32."""
        alpha, sigma = alpha_sigma(t.float().clamp(MIN_TIMESTEP, NUM_TIMESTEPS - MIN_TIMESTEP))
        if self.kind == "uniform":
            return 0.5 * alpha * sigma  # |d(t/1000) / d(log SNR)|
        return self.band.holds(log_snr(t)) / (self.band.high - self.band.low)

    def elbo_weight(self, t: Tensor, density: Tensor | None = None) -> Tensor:
        """What a squared error at timestep t (any shape) counts in the bound: SNR/2 over the density with which t was
        drawn (None: this sampler's), float32.

        0 where nothing is drawn and outside the bound's integral: at t = 0, above all, where it would be infinite.
        """
        value, density = log_snr(t), self.density(t) if density is None else density
        counts = self.bound_range.holds(value) & (density > 0)
        weight = torch.where(counts, 0.5 * value.exp() / density, 0.0)
        if self.kind == "noisy":  # those at the end are no part of the integral
            weight = weight * (value > self.band.low + 1e-3) / (1 - NOISY_SHARE)
        return weight
