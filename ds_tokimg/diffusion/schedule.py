"""Noise levels that are learnt: drawn where the loss changes fastest.

The cross-entropy at a noise level is what is still unknown about a token there, so its slope over log-SNR is the rate
at which information arrives. Drawing noise levels in proportion to it takes equal steps in entropy: the time warping of
Dieleman et al., "Continuous diffusion for categorical data" (2022), section 3.3, and the entropic time of Stancevic,
Handke & Ambrogioni, "Entropic time schedulers for generative diffusion models" (2025).

Samples are drawn ahead of time, by loaders that know nothing of the loss: uniformly over the codec's readable band. The
map from those to the learnt levels is applied when a sample is used, with the state that all ranks share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_tokimg.diffusion.path import Band, log_snr, timestep_of_log_snr

BINS = 32
DECAY = 0.99  # of what was seen, a step: about the last hundred steps count
UNIFORM_SHARE = 0.2  # of the draws that cover the band evenly, so that no level is forgotten
PREFIXES = ("schedule_nats_", "schedule_tokens_")


class EntropicSchedule:
    """Which noise levels are drawn, and what that is decided by: nats and tokens seen in each bin of log-SNR.

    Args:
        band: the range of log-SNR that is drawn from.
    """

    def __init__(self, band: Band):
        self.band = band
        self.nats = torch.zeros(BINS, dtype=torch.float64)
        self.tokens = torch.zeros(BINS, dtype=torch.float64)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def width(self) -> float:
        """Of a bin, in log-SNR."""
        return (self.band.high - self.band.low) / BINS

    def shares(self) -> Tensor:
        """How much is drawn from each bin: float64 [BINS], sums to 1; even until every bin has been seen."""
        even = torch.full((BINS,), 1 / BINS, dtype=torch.float64)
        if not (self.tokens > 0).all():
            return even
        fall = -torch.diff(self.nats / self.tokens).clamp(max=0)  # between the middles of neighbouring bins
        slope = torch.cat([fall[:1], 0.5 * (fall[1:] + fall[:-1]), fall[-1:]])
        if slope.sum() == 0:
            return even
        return (1 - UNIFORM_SHARE) * slope / slope.sum() + UNIFORM_SHARE * even

    def warp(self, t: Tensor) -> Tensor:
        """Timesteps of any shape, log-SNR even over the band -> the learnt ones, float32."""
        ends, shares = self._table(t.device)
        place = ((log_snr(t) - self.band.low) / (self.band.high - self.band.low)).clamp(0, 1)
        bins = (torch.searchsorted(ends, place, right=True) - 1).clamp(0, BINS - 1)
        inside = (place - ends[bins]) / shares[bins]
        return timestep_of_log_snr(self.band.low + (bins + inside) * self.width)

    def density(self, t: Tensor) -> Tensor:
        """Probability density of log-SNR with which `warp` gives timestep t (any shape), float32."""
        value = log_snr(t)
        return self.band.holds(value) * self._table(t.device)[1][self._bins(value)] / self.width

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(where each bin begins and the last one ends, as a share of all draws: [BINS + 1]; `shares` [BINS]), float32.

        Sent once an update, and without waiting for the device.
        """
        if device not in self._tables:
            shares = self.shares()
            ends = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
            table = torch.cat([ends, shares]).float()
            if device.type != "cpu" and torch.accelerator.is_available():
                table = table.pin_memory()
            table = table.to(device, non_blocking=True)
            self._tables = {device: (table[: BINS + 1], table[BINS + 1 :])}
        return self._tables[device]

    def _bins(self, value: Tensor) -> Tensor:
        return ((value - self.band.low) / self.width).long().clamp(0, BINS - 1)

    def seen(self, t: Tensor, nats: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """What a micro-batch adds: scalars by name, to be summed over micro-batches and ranks for `update`.

        t [B, N or 1]; nats [B, N], the cross-entropy of each patch's tokens; tokens [B, N], how many these are.
        """
        bins = self._bins(log_snr(t)).expand(nats.shape).flatten()
        zeros = torch.zeros(BINS, dtype=torch.float64, device=nats.device)
        sums = [zeros.index_add(0, bins, value.double().flatten()) for value in (nats, tokens)]
        return {f"{prefix}{i:02d}": s[i] for prefix, s in zip(PREFIXES, sums, strict=True) for i in range(BINS)}

    def update(self, sums: dict[str, float]) -> None:
        """After an optimiser step, with the sums of `seen` over the train batch."""
        for kept, prefix in zip((self.nats, self.tokens), PREFIXES, strict=True):
            new = torch.tensor([float(sums[f"{prefix}{i:02d}"]) for i in range(BINS)], dtype=torch.float64)
            kept.mul_(DECAY).add_(new)
        self._tables.clear()

    def state(self) -> dict[str, list[float]]:
        """As JSON values, exactly."""
        return {"nats": self.nats.tolist(), "tokens": self.tokens.tolist()}

    def load_state(self, state: dict[str, list[float]]) -> None:
        self.nats = torch.tensor(state["nats"], dtype=torch.float64)
        self.tokens = torch.tensor(state["tokens"], dtype=torch.float64)
        self._tables.clear()
