"""Makes the micro-batches: token ids in patches, and every random draw of a sample.

All draws are keyed by (seed, epoch, sample) (see `ds_tokimg.data.rng`); nothing here depends on the rank or on how a
train batch was cut up. Runs in the loader's background thread; the result is CPU tensors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ds_tokimg.data.rng import Stream, generator, low_discrepancy
from ds_tokimg.diffusion.timesteps import TimestepSampler
from ds_tokimg.tokens.layout import PatchLayout


def fill_canvas(ids: np.ndarray, length: int, eos_id: int) -> np.ndarray:
    """The ids with EOS after them up to `length` (unchanged if they are longer)."""
    return np.pad(ids, (0, max(0, length - len(ids))), constant_values=eos_id)


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


class BatchMaker:
    """Indices of a micro-batch -> the tensors that `TrainingLoss` takes.

    Args:
        patch_noise: share of the samples in which every patch has a noise level of its own.
        block_size: patches that have a noise level in common and see the clean ones before them; 0: the whole image.
        condition_drop: probability that a sample's condition is hidden; None when the model has no conditions.
        in_turn: share of the samples in which tokens are predicted in turn (`JiT.predict`).
        canvas: with conditions, the largest number of patches an answer is generated on. An answer is filled up with
            `eos_id` to the end of its last patch, and in every second sample on average further, up to a random
            number of patches: when generating, nobody knows how long the answer will be.
    """

    def __init__(
        self,
        layout: PatchLayout,
        timesteps: TimestepSampler,
        seed: int,
        patch_noise: float = 0.0,
        condition_drop: float | None = None,
        block_size: int = 0,
        canvas: int = 0,
        eos_id: int = 0,
        in_turn: float = 0.0,
    ):
        self.layout, self.timesteps, self.seed = layout, timesteps, seed
        self.patch_noise, self.condition_drop = patch_noise, condition_drop
        self.block_size, self.canvas, self.eos_id, self.in_turn = block_size, canvas, eos_id, in_turn

    def __call__(self, dataset, indices, positions, epoch: int) -> dict[str, Tensor]:
        """`indices`: samples of the dataset; `positions`: their places in the epoch's order. Both may be empty."""
        texts = [self._on_canvas(dataset, epoch, int(i)) for i in indices]
        ids, mask = self.layout.pack(texts or [np.zeros(0, np.int64)])
        patches = self.layout.num_patches([len(text) for text in texts])
        batch = {"ids": ids, "mask": mask}
        batch["t"] = self._timesteps(indices, positions, epoch, patches, ids.shape[1])
        batch["noise"] = self._noise(indices, epoch, patches, ids.shape[1])
        if self.block_size:
            batch["blocks"] = blocks_of(ids.shape[1], self.block_size)
        if self.in_turn:
            # Samples with a noise level per patch come first: those with one level are what a bound can be told from.
            batch["in_turn"] = torch.from_numpy(_share_of(positions if len(indices) else [0], self.in_turn))
        if self.condition_drop is not None:
            prompts = [self._prompt(dataset, epoch, int(i)) for i in indices]
            batch["condition_ids"], batch["condition_mask"] = self.layout.pack(prompts or [np.zeros(0, np.int64)])
        return batch

    def _on_canvas(self, dataset, epoch: int, index: int) -> np.ndarray:
        ids = dataset.ids(index)
        if not self.canvas or not len(dataset.prompt_ids(index)):
            return ids
        own = int(self.layout.num_patches([len(ids)])[0])
        draw = generator(self.seed, Stream.CANVAS, epoch, index)
        patches = int(draw.integers(own, max(own, self.canvas) + 1)) if draw.random() < 0.5 else own
        return fill_canvas(ids, patches * self.layout.slots, self.eos_id)

    def _prompt(self, dataset, epoch: int, index: int) -> np.ndarray:
        if generator(self.seed, Stream.CONDITION_DROP, epoch, index).random() < self.condition_drop:
            return np.zeros(0, np.int64)
        return dataset.prompt_ids(index)

    def _timesteps(self, indices, positions, epoch: int, patches, width: int) -> Tensor:
        """[B], or [B, N] where blocks, or the patches of some samples, have noise levels of their own."""
        u = low_discrepancy(self.seed, Stream.TIMESTEP, epoch, positions) if len(positions) else np.zeros(1)
        if not self.patch_noise and not self.block_size:
            return self.timesteps(torch.from_numpy(u))
        per_patch = np.repeat((u[:, None] + stagger(width, self.block_size)) % 1.0, 1 if self.block_size else width, 1)
        for row in np.flatnonzero(_share_of(positions, self.patch_noise)):
            draw = generator(self.seed, Stream.TIMESTEP, epoch, int(indices[row]))
            per_patch[row, : patches[row]] = draw.random(int(patches[row]))
        return self.timesteps(torch.from_numpy(per_patch))

    def _noise(self, indices, epoch: int, patches, width: int) -> Tensor:
        noise = np.zeros((max(1, len(indices)), width, self.layout.values), dtype=np.float32)
        for row, index in enumerate(indices):
            draw = generator(self.seed, Stream.NOISE, epoch, int(index))
            draw.standard_normal(dtype=np.float32, out=noise[row, : patches[row]])
        return torch.from_numpy(noise)
