"""The noising path, between which of its noise levels a code can be read, and the choice of timesteps.

One path for training, sampling and the bound (rectified flow, Liu et al. 2022; JiT, Li & He 2025):

    noisy = (1 - t/1000) * clean + (t/1000) * noise,    t in [0, 1000): 0 is clean
    log_snr(t) = 2 log((1 - t/1000) / (t/1000))

Timesteps may be integers (the reference's) or real numbers: fine codes become readable below t = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ds_tokimg.choices import TIMESTEPS

NUM_TIMESTEPS = 1000
# The clean end of the path has no noise at all: its log-SNR is reported as that of this timestep.
MIN_TIMESTEP = 1e-2
START = 999.0  # the timestep where sampling begins
LOG_SNR_START = 2.0 * math.log((NUM_TIMESTEPS - START) / START)
# Where the bound's integral over log-SNR begins: hardly any signal is left.
LOG_SNR_MIN = -8.0
# At the other end this many standard deviations of noise fit into half a step between levels.
MARGIN = 6.0
# Noise levels whose information is computed together: as many as keep the numbers in the cache.
_RATES_AT_ONCE = 8
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


@dataclass(frozen=True)
class Band:
    """A range of log-SNR."""

    low: float
    high: float

    def holds(self, value: Tensor) -> Tensor:
        """Bool of value's shape; the ends belong to it, also when they come back from float32 timesteps."""
        return (value >= self.low - 1e-4) & (value <= self.high + 1e-4)


def bound_range(radix: int) -> Band:
    """What the bound integrates over (`ds_tokimg.training.bound`): from hardly any signal to hardly any error."""
    return Band(LOG_SNR_MIN, 2.0 * math.log(MARGIN * (radix - 1)))


@lru_cache(maxsize=8)
def readable_band(radix: int, missing: float = 0.005) -> Band:
    """The log-SNR range that holds all but a share `missing` of a digit's information at either end.

    With no context, what z = x + sqrt(1/SNR) noise tells about a digit x (uniform over `radix` levels) follows from
    I-MMSE (Guo, Shamai, Verdu 2005): dI/d(log SNR) = SNR/2 * mmse(SNR), the integrand of the diffusion bound. Below
    the band nothing can be read, above it everything can, whatever the context: there is nothing to learn outside.
    """
    grid = torch.linspace(-12.0, 18.0, 301, dtype=torch.float64)
    rates = [information_rate(radix, some) for some in grid.split(_RATES_AT_ONCE)]
    share = torch.cumulative_trapezoid(torch.cat(rates), grid)
    low, high = np.interp([missing, 1.0 - missing], share / share[-1], grid[1:])
    return Band(float(low), float(high))


def information_rate(radix: int, log_snr_value: float | Tensor) -> Tensor:
    """SNR/2 * mmse of a uniform digit, by quadrature over the noise (nodes of +-6 standard deviations): shape of
    `log_snr_value`, float64."""
    levels = torch.linspace(-1.0, 1.0, radix, dtype=torch.float64)
    deviation = torch.exp(-0.5 * torch.as_tensor(log_snr_value, dtype=torch.float64))
    nodes = torch.linspace(-6.0, 6.0, 61, dtype=torch.float64)
    density = torch.exp(-0.5 * nodes**2)
    picked, weights = _few_levels(radix)
    centre = levels[picked][:, None]  # [picked, 1]
    z = centre + deviation[..., None, None] * nodes  # [..., picked, nodes]
    logits = -0.5 * ((z[..., None] - levels) / deviation[..., None, None, None]) ** 2  # [..., picked, nodes, radix]
    error = (logits.softmax(-1) @ levels - centre) ** 2
    mmse = weights @ error @ density / density.sum()
    return 0.5 * mmse / deviation**2


def _few_levels(radix: int) -> tuple[Tensor, Tensor]:
    """Levels that stand for all of a code, and their shares: both ends, and of the inner levels one from each group of
    neighbours, which are alike."""
    if radix <= 16:
        return torch.arange(radix), torch.full((radix,), 1.0 / radix, dtype=torch.float64)
    groups = torch.tensor_split(torch.arange(1, radix - 1), 14)
    picked = torch.tensor([0, *[int(group[len(group) // 2]) for group in groups], radix - 1])
    return picked, torch.tensor([1, *map(len, groups), 1], dtype=torch.float64) / radix


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
