"""How noise levels are drawn in training."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_tokimg.choices import TIMESTEPS
from ds_tokimg.diffusion.band import bound_range, readable_band
from ds_tokimg.diffusion.path import MIN_TIMESTEP, NUM_TIMESTEPS, alpha_sigma, log_snr, timestep_of_log_snr

# Of the draws of `noisy`, those at the noisy end of the band.
NOISY_SHARE = 0.75


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
