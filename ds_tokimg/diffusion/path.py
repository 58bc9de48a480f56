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

NUM_TIMESTEPS = 1000
# The clean end of the path has no noise at all: its log-SNR is reported as that of this timestep.
MIN_TIMESTEP = 1e-2
START = 999.0  # the timestep where sampling begins
LOG_SNR_START = 2.0 * math.log((NUM_TIMESTEPS - START) / START)


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
