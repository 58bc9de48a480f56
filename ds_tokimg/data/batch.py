"""Micro-batches: token ids in patches, and every random draw of a sample.

All draws are keyed by (seed, epoch, sample) (see `ds_tokimg.data.rng`); nothing here depends on the rank or on how a
train batch was cut up. Runs in the loader's background thread; the result is CPU tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds_tokimg.data.rng import Stream, generator, low_discrepancy
from ds_tokimg.diffusion.path import TimestepSampler
from ds_tokimg.tokens.layout import PatchLayout


class Prompt(NamedTuple):
    """What a text is an answer to; a row without a valid token has none."""

    ids: Tensor  # [B, M, K] int64
    mask: Tensor  # [B, M, K] bool


@dataclass(frozen=True)
class Batch:
    """A micro-batch as `TrainingLoss` takes it: B texts in N patches of K tokens, or of P channel values."""

    ids: Tensor  # [B, N, K] int64
    mask: Tensor  # [B, N, K] bool, slots that hold a token
    t: Tensor  # [B], or [B, N] where patches have noise levels of their own; float32
    noise: Tensor  # [B, N, P] float32
    prompt: Prompt | None = None  # models with conditions
    blocks: Tensor | None = None  # [N] int64, which block a patch belongs to, from left to right; None: the whole image
    in_turn: Tensor | None = None  # [B] bool, texts whose tokens are predicted in turn; None: none are

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of `change(tensor)` in place of each tensor."""
        tensors = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Prompt):
                tensors[field.name] = Prompt(*map(change, value))
            else:
                tensors[field.name] = value if value is None else change(value)
        return Batch(**tensors)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory it is copied without waiting."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def replace(self, **changes) -> Batch:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Canvas:
    """What answers are written on: at most so many patches, filled up with the end-of-text token."""

    patches: int
    eos_id: int

    def fill(self, ids: np.ndarray, length: int) -> np.ndarray:
        """The ids with EOS after them up to `length` (unchanged if they are longer)."""
        return np.pad(ids, (0, max(0, length - len(ids))), constant_values=self.eos_id)


@dataclass(frozen=True)
class BatchPacker:
    """Texts and what was drawn for them -> a Batch.

    block_size: see `ds_tokimg.diffusion.writing.Writing`.
    """

    layout: PatchLayout
    block_size: int = 0

    def __call__(
        self,
        texts: Sequence[np.ndarray],
        t: Tensor,
        noises: Sequence[np.random.Generator],
        prompts: Sequence[np.ndarray] | None = None,
        in_turn: np.ndarray | None = None,
    ) -> Batch:
        """t: timesteps [B], [B, 1] or [B, N]; noises: where each text's noise is drawn from. Without a text the batch
        is one row of padding (t, prompts and in_turn: of that row)."""
        empty = [np.zeros(0, np.int64)]
        ids, mask = self.layout.pack(list(texts) or empty)
        count = ids.shape[1]
        return Batch(
            ids=ids,
            mask=mask,
            t=t.expand(-1, count) if self.block_size and t.dim() == 2 else t,
            noise=self._noise(noises, self.layout.num_patches([len(text) for text in texts]), count),
            prompt=None if prompts is None else Prompt(*self.layout.pack(list(prompts) or empty)),
            blocks=blocks_of(count, self.block_size) if self.block_size else None,
            in_turn=None if in_turn is None else torch.from_numpy(in_turn),
        )

    def _noise(self, noises: Sequence[np.random.Generator], patches: np.ndarray, count: int) -> Tensor:
        """Standard normal [B, count, P] in the patches of each text, 0 in padding: independent of the batch."""
        values = np.zeros((max(1, len(noises)), count, self.layout.values), dtype=np.float32)
        for row, draw, own in zip(values, noises, patches, strict=False):
            draw.standard_normal(dtype=np.float32, out=row[:own])
        return torch.from_numpy(values)


def blocks_of(patches: int, block_size: int) -> Tensor:
    """Which block each patch belongs to: int64 [patches]."""
    return torch.arange(patches) // block_size


def stagger(patches: int, block_size: int) -> np.ndarray:
    """What is added to a sample's offset in [0, 1) for each of its patches, [1, patches], so that the noise levels of
    its blocks cover the range evenly; [1, 1] without blocks.

    The factor is another than that of `low_discrepancy`: with 1/p and 1/p^2, p^3 = p + 1, samples and blocks together
    cover it as well (Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
    """
    if not block_size:
        return np.zeros((1, 1))
    return np.arange(patches)[None] // block_size * 0.7548776662466927


def _share_of(positions, share: float) -> np.ndarray:
    """A share of the places in an epoch, evenly spread: bool."""
    places = np.asarray(positions)
    return np.floor((places + 1) * share) > np.floor(places * share)


@dataclass(frozen=True)
class Draws:
    """What is drawn of every sample in training, besides its noise.

    patch_noise: share of the samples in which every patch has a noise level of its own.
    in_turn: share of the samples in which tokens are predicted in turn (`JiT.predict`).
    condition_drop: probability that a sample's prompt is hidden; None when the model has no conditions.
    canvas: with conditions, what answers are written on. An answer is filled up to the end of its last patch, and in
        every second sample on average further, up to a random number of patches: when generating, nobody knows how
        long the answer will be.
    """

    patch_noise: float = 0.0
    in_turn: float = 0.0
    condition_drop: float | None = None
    canvas: Canvas | None = None


NO_DRAWS = Draws()


class BatchMaker:
    """Indices of a micro-batch -> a Batch, with the draws of training.

    Args:
        packer: makes the tensors.
        timesteps: how noise levels are drawn.
        seed: of all draws.
        draws: what is drawn besides.
    """

    def __init__(self, packer: BatchPacker, timesteps: TimestepSampler, seed: int, draws: Draws = NO_DRAWS):
        self.packer, self.timesteps, self.seed, self.draws = packer, timesteps, seed, draws

    def __call__(self, dataset, indices, positions, epoch: int) -> Batch:
        """`indices`: samples of the dataset; `positions`: their places in the epoch's order. Both may be empty."""
        texts = [self._text(dataset, epoch, int(i)) for i in indices]
        prompts = in_turn = None
        if self.draws.condition_drop is not None:
            prompts = [self._prompt(dataset, epoch, int(i)) for i in indices]
        if self.draws.in_turn:
            # Samples with a noise level per patch come first: those with one level are what a bound can be told from.
            in_turn = _share_of(positions if len(indices) else [0], self.draws.in_turn)
        t = self._timesteps(texts, indices, positions, epoch)
        noises = [generator(self.seed, Stream.NOISE, epoch, int(i)) for i in indices]
        return self.packer(texts, t, noises, prompts, in_turn)

    def _text(self, dataset, epoch: int, index: int) -> np.ndarray:
        ids, canvas, layout = dataset.ids(index), self.draws.canvas, self.packer.layout
        if canvas is None or not len(dataset.prompt_ids(index)):
            return ids
        own = int(layout.num_patches([len(ids)])[0])
        draw = generator(self.seed, Stream.CANVAS, epoch, index)
        patches = int(draw.integers(own, max(own, canvas.patches) + 1)) if draw.random() < 0.5 else own
        return canvas.fill(ids, patches * layout.slots)

    def _prompt(self, dataset, epoch: int, index: int) -> np.ndarray:
        if generator(self.seed, Stream.CONDITION_DROP, epoch, index).random() < self.draws.condition_drop:
            return np.zeros(0, np.int64)
        return dataset.prompt_ids(index)

    def _timesteps(self, texts, indices, positions, epoch: int) -> Tensor:
        """[B], or [B, N] where blocks, or the patches of some samples, have noise levels of their own."""
        u = low_discrepancy(self.seed, Stream.TIMESTEP, epoch, positions) if len(positions) else np.zeros(1)
        block_size = self.packer.block_size
        if not self.draws.patch_noise and not block_size:
            return self.timesteps(torch.from_numpy(u))
        patches = self.packer.layout.num_patches([len(text) for text in texts])
        width = max(1, int(patches.max(initial=0)))
        per_patch = np.repeat((u[:, None] + stagger(width, block_size)) % 1.0, 1 if block_size else width, 1)
        for row in np.flatnonzero(_share_of(positions, self.draws.patch_noise)):
            draw = generator(self.seed, Stream.TIMESTEP, epoch, int(indices[row]))
            per_patch[row, : patches[row]] = draw.random(int(patches[row]))
        return self.timesteps(torch.from_numpy(per_patch))
