"""Where between noise and image a code is read: the noise levels at which the bound is measured and sampling steps."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ds_tokimg.diffusion import bound_range, information_rate

# Tokens that are drawn in turn are drawn after this share of what a reader without context learns on the way from noise
# to image: further on, what the network loses at every level costs more than what only the noise tells.
DRAWN_SHARE = 0.2


@lru_cache(maxsize=8)
def noise_levels(radix: int) -> NoiseLevels:
    return NoiseLevels(radix)


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

    def quantile(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u in [0, 1) -> (log-SNR, its sampling density), float64 arrays."""
        cell = np.clip(np.searchsorted(self._cumulative, u, side="right") - 1, 0, len(self._density) - 1)
        value = self.grid[cell] + (u - self._cumulative[cell]) / self._density[cell]
        return value, self._density[cell]

    @property
    def drawn_at(self) -> float:
        """The log-SNR at which tokens are drawn in turn."""
        return float(self.quantile(np.array(DRAWN_SHARE))[0])
