"""Texts as the batches on which a bound is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ds_tokimg.data.batch import Batch, BatchPacker, Canvas, stagger
from ds_tokimg.data.rng import Stream, generator, low_discrepancy
from ds_tokimg.diffusion.levels import SamplingPath
from ds_tokimg.diffusion.path import timestep_of_log_snr
from ds_tokimg.tokens.layout import PatchLayout


@dataclass
class ValidationBatches:
    """Batches of texts of similar length, with noise that is fixed for each text.

    dataset, layout: see `estimate_bound`. path: the one that is bounded. seed: of the noise. conditional: the texts'
    prompts are given. canvas: what answers are filled up to, as the model does not know their length; None: they are
    not.
    """

    dataset: Any
    layout: PatchLayout
    path: SamplingPath
    seed: int = 0
    conditional: bool = False
    canvas: Canvas | None = None

    def __post_init__(self):
        self.packer = BatchPacker(self.layout, self.path.writing.block_size)
        self.text_tokens = np.array([len(self.dataset.ids(i)) for i in range(len(self))])
        self.scored_tokens = np.array([self._scored_tokens(i) for i in range(len(self))])
        self.patches = np.asarray(self.layout.num_patches(self.scored_tokens))

    def __len__(self) -> int:
        """Texts."""
        return len(self.dataset)

    def _scored_tokens(self, index: int) -> int:
        """The text's tokens and, for an answer, the EOS that fill up its canvas (and always its last patch)."""
        own = int(self.text_tokens[index])
        if self.canvas is None or not len(self.dataset.prompt_ids(index)):
            return own
        return max(int(self.layout.num_patches([own])[0]), self.canvas.patches) * self.layout.slots

    def ids(self, index: int) -> np.ndarray:
        ids = self.dataset.ids(index)
        return ids if self.canvas is None else self.canvas.fill(ids, int(self.scored_tokens[index]))

    def of_rank(self, rank: int, world_size: int, patches_per_batch: int) -> list[np.ndarray]:
        """Indices of the texts of each of a rank's batches.

        Every rank runs the same number of forward passes (ZeRO-3 gathers parameters in each): short ranks get empty
        ones.
        """
        groups = self._groups(patches_per_batch)
        groups += [np.zeros(0, int)] * (-len(groups) % world_size)
        return groups[rank::world_size]

    def _groups(self, patches_per_batch: int) -> list[np.ndarray]:
        """Indices of texts, similar lengths together, at most `patches_per_batch` patches (but at least a text)."""
        order = np.argsort(-self.patches, kind="stable")
        groups, start = [], 0
        while start < len(order):
            size = max(1, patches_per_batch // max(1, int(self.patches[order[start]])))
            groups.append(order[start : start + size])
            start += size
        return groups

    def offsets(self, indices: np.ndarray) -> np.ndarray:
        """Where within its stratum each sample, or each of its patches, has its noise level: [B, N or 1] in [0, 1)."""
        start = low_discrepancy(self.seed, Stream.VALIDATION, 0, indices)[:, None]
        return (start + stagger(int(self.patches[indices].max(initial=1)), self.packer.block_size)) % 1.0

    def make(self, indices: np.ndarray, log_snr: np.ndarray, noise: int) -> Batch:
        """Texts at log-SNR [B, N or 1], with the `noise`-th of the noises that are fixed for each of them."""
        t = timestep_of_log_snr(torch.from_numpy(log_snr)).float() if len(indices) else torch.zeros(1, 1)
        return self.packer(
            [self.ids(int(i)) for i in indices],
            t if self.packer.block_size else t[:, 0],
            [generator(self.seed, Stream.VALIDATION, 1 + noise, int(i)) for i in indices],
            [self.dataset.prompt_ids(int(i)) for i in indices] if self.conditional else None,
        )

    def drawn(self, indices: np.ndarray, noise: int) -> Batch:
        """`make`, where tokens are drawn."""
        batch = self.make(indices, np.full((len(indices), 1), self.path.drawn_at), noise)
        if not self.path.writing.in_turn:
            return batch
        return batch.replace(in_turn=torch.ones(len(batch.ids), dtype=torch.bool))
