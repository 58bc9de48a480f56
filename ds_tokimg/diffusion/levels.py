"""Where between noise and image a code is read: the noise levels of the bound, and those that sampling steps on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ds_tokimg.diffusion.path import LOG_SNR_MIN, LOG_SNR_START, bound_range, information_rate, timestep_of_log_snr
from ds_tokimg.diffusion.writing import Writing

# Tokens that are drawn in turn are drawn after this share of what a reader without context learns on the way from noise
# to image: further on, what the network loses at every level costs more than what only the noise tells.
DRAWN_SHARE = 0.2


class NoiseLevels:
    """Where the integral over log-SNR is sampled, for a code of `radix` levels.

    Mostly in proportion to what a reader without context gains there, which keeps the weights of the estimate even;
    a tenth is uniform over the whole range, so that no weight is large.
    """

    def __init__(self, radix: int):
        whole = bound_range(radix)
        self.grid = np.linspace(whole.low, whole.high, 513)
        rate = np.array([float(information_rate(radix, value)) for value in self.grid])
        density = 0.9 * rate / np.trapezoid(rate, self.grid) + 0.1 / (whole.high - whole.low)
        steps = 0.5 * (density[1:] + density[:-1]) * np.diff(self.grid)
        self._cumulative = np.concatenate([[0.0], steps.cumsum()])
        # Quantiles are linear between grid points, so the density that counts is constant there.
        self._density = steps / self._cumulative[-1] / np.diff(self.grid)
        self._cumulative /= self._cumulative[-1]

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, radix: int) -> NoiseLevels:
        """Those of a code, computed once."""
        return cls(radix)

    def quantile(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u in [0, 1) -> (log-SNR, its sampling density), float64 arrays."""
        cell = np.clip(np.searchsorted(self._cumulative, u, side="right") - 1, 0, len(self._density) - 1)
        value = self.grid[cell] + (u - self._cumulative[cell]) / self._density[cell]
        return value, self._density[cell]

    @property
    def drawn_at(self) -> float:
        """The log-SNR at which tokens are drawn in turn."""
        return float(self.quantile(np.array(DRAWN_SHARE))[0])


@dataclass(frozen=True)
class SamplingPath:
    """The way from noise to tokens that is bounded, of a text that is written so."""

    levels: NoiseLevels
    writing: Writing

    @property
    def drawn_at(self) -> float | None:
        """The log-SNR where tokens are drawn from what the network says of them; None: they are read at the end."""
        if self.writing.one_step:
            return LOG_SNR_START
        return self.levels.drawn_at if self.writing.in_turn else None

    @property
    def noisiest(self) -> float:
        return LOG_SNR_START if self.writing.one_step else LOG_SNR_MIN

    @property
    def share(self) -> float:
        """How much of the noise levels lies before; objective and accuracy of a single step are those of all levels."""
        return DRAWN_SHARE if self.writing.in_turn and not self.writing.one_step else 1.0

    def quantile(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u in [0, 1) -> (log-SNR before tokens are drawn, its sampling density)."""
        log_snr, density = self.levels.quantile(self.share * u)
        return log_snr, density / self.share

    def trained(self, timesteps: Any) -> float:
        """The share of the noise levels in training that lie before tokens are drawn."""
        if self.share == 1:
            return 1.0
        assert self.drawn_at is not None  # a share below 1: tokens are drawn in turn
        grid = torch.linspace(LOG_SNR_MIN, self.drawn_at, 513, dtype=torch.float64)
        return float(torch.trapezoid(timesteps.density(timestep_of_log_snr(grid)).double(), grid))
