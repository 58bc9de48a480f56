"""Between which noise levels a code can be read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Where the bound's integral over log-SNR begins: hardly any signal is left.
LOG_SNR_MIN = -8.0
# At the other end this many standard deviations of noise fit into half a step between levels.
MARGIN = 6.0
# Noise levels whose information is computed together: as many as keep the numbers in the cache.
_RATES_AT_ONCE = 8


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
