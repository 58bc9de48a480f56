"""The order of the samples, and who computes which of them."""

from __future__ import annotations

import numpy as np

# Train batches among which samples of similar length are sought. More leave less padding, but make a batch more of
# one kind; with 64, texts of 1 to 60 patches in batches of 32 are padded by 6-8 %.
_BATCHES_SORTED_TOGETHER = 64


class Mixture:
    """Sources with weights: what share of an epoch's images each of them gives.

    An epoch has as many images as the sources hold together, whatever the weights. A source with fewer images than its
    share is gone through more than once in an epoch; one with more goes on in the next epoch where it stopped. So
    over the epochs all images of a source are seen equally often.

    Args:
        source_of: the source of each sample, int [samples]; every source has one.
        weights: of the sources; only their ratios matter.
    """

    def __init__(self, source_of: np.ndarray, weights: list[float]):
        self.size = len(source_of)
        self.samples = [np.flatnonzero(source_of == source) for source in range(len(weights))]
        ends = np.round(np.cumsum(weights) / np.sum(weights) * self.size).astype(np.int64)
        self.counts = np.diff(ends, prepend=0)  # images of each source in an epoch

    @property
    def most_passes(self) -> int:
        """How often an epoch may begin a source anew, at most."""
        return max(-(-int(n) // len(own)) + 1 for n, own in zip(self.counts, self.samples, strict=True))

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of an epoch, source by source, int64 [samples]. What is seen for the k-th time in it is number
        sample + k · samples, k from 0: a draw that is keyed by this number is another one each time."""
        return np.concatenate([self._draw(seed, epoch, source) for source in range(len(self.samples))])

    def _draw(self, seed: int, epoch: int, source: int) -> np.ndarray:
        own, count = self.samples[source], int(self.counts[source])
        first, last = epoch * count, (epoch + 1) * count  # places in an endless row of passes over the source
        passes = range(first // len(own), -(-last // len(own)))
        orders = [np.random.default_rng([seed, source, number]).permutation(own) for number in passes]
        row = np.concatenate([order + k * self.size for k, order in enumerate(orders)] or [own[:0]])
        skip = first - passes.start * len(own)
        return row[skip : skip + count]


class TrainBatchSampler:
    """A fresh order of all samples in every epoch, in train batches of similar lengths.

    An incomplete last batch is left out (chance decides which samples these are); fewer samples than one
    batch make one short batch.

    Args:
        lengths: what a sample costs, int [samples].
        train_batch_size: samples per optimiser step, over all ranks.
        seed: together with the epoch it decides the order.
        bucket: whether to seek similar lengths.
        mixture: how an epoch draws on sources with weights; None: every sample once.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        train_batch_size: int,
        seed: int,
        bucket: bool = True,
        mixture: Mixture | None = None,
    ):
        self.lengths, self.train_batch_size, self.seed, self.bucket = lengths, train_batch_size, seed, bucket
        self.mixture = mixture

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.lengths), self.train_batch_size)

    def batches(self, epoch: int, start: int = 0) -> list[np.ndarray]:
        """The train batches of an epoch from number `start` on: sample indices, int64, shortest sample first."""
        generator = np.random.default_rng([self.seed, epoch])
        size, steps = self.train_batch_size, self.steps_per_epoch
        order = generator.permutation(len(self.lengths))[: steps * size]
        if self.mixture:
            order = self.mixture.draw(self.seed, epoch)[order]
        stretch = size * (_BATCHES_SORTED_TOGETHER if self.bucket else 1)
        batches = []
        for first in range(0, len(order), stretch):
            samples = order[first : first + stretch]
            samples = samples[np.argsort(self.lengths[samples % len(self.lengths)], kind="stable")]
            batches += [samples[i : i + size] for i in range(0, len(samples), size)]
        return [batches[i] for i in generator.permutation(steps)[start:]]


def steps_per_epoch(num_samples: int, train_batch_size: int) -> int:
    """Train batches in an epoch: complete ones, and at least one."""
    return max(1, num_samples // train_batch_size)


def partition(num_samples: int, world_size: int, accumulation: int, rank: int) -> list[slice]:
    """Which part of a train batch, sorted by length, is each micro-batch of this rank.

    Micro-step i of all ranks takes neighbours in the order, so that ranks finish together and little is
    padded. Every second micro-step deals them out in reverse, or the last rank would always get the longest.
    Micro-batches differ by at most one sample in size; with fewer samples than micro-batches some are empty.
    """
    parts = world_size * accumulation
    cuts = [num_samples * k // parts for k in range(parts + 1)]
    slices = []
    for step in range(accumulation):
        place = rank if step % 2 == 0 else world_size - 1 - rank
        part = step * world_size + place
        slices.append(slice(cuts[part], cuts[part + 1]))
    return slices
