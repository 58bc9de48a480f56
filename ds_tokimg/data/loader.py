"""From samples to train batches: which samples, which rank computes which, and a thread that prepares the next ones.

The order of the samples depends on (seed, epoch, train batch size) alone. Ranks and micro-batches only decide
who computes what, so any of them sees the same train batches, and a restart goes on where it stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ds_tokimg.data.batch import Batch
from ds_tokimg.data.order import TrainBatchSampler, partition


@dataclass(frozen=True)
class LoadedBatch:
    """One rank's share of a train batch.

    wait_seconds: how long the consumer stood still for it.
    """

    epoch: int
    micro_batches: list[Batch]
    wait_seconds: float


@dataclass(frozen=True)
class Part:
    """Which micro-batches of a train batch are one rank's, see `partition`."""

    world_size: int = 1
    rank: int = 0
    accumulation: int = 1


ALL = Part()


class BatchLoader:
    """Prepares this rank's micro-batches in background threads while the step before is computed.

    Args:
        dataset: handed on to `collate`.
        sampler: decides the train batches.
        collate: `collate(dataset, indices, positions, epoch)` -> Batch on the CPU. `indices` are the samples of a
            micro-batch (maybe none), `positions` their places in the epoch's order.
        part: which of the micro-batches are prepared.
        num_workers: threads; 0 prepares each batch when it is asked for.
        ahead: train batches that are kept ready.
        pin_memory: page-locked tensors, from which copies to a GPU are asynchronous.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: TrainBatchSampler,
        collate: Callable[..., Batch],
        part: Part = ALL,
        *,
        num_workers: int = 2,
        ahead: int = 2,
        pin_memory: bool = False,
    ):
        self.dataset, self.sampler, self.collate = dataset, sampler, collate
        self.part, self.num_workers, self.ahead, self.pin_memory = part, num_workers, ahead, pin_memory

    def batches(self, first_step: int, last_step: int) -> Generator[LoadedBatch, None, None]:
        """The batches of optimiser steps first_step … last_step-1, counted from 0 over all epochs.

        An error in a thread is raised here, at the batch it belongs to. Leaving the loop early ends the
        threads.
        """
        if self.num_workers == 0:
            for epoch, number, indices in self._plan(first_step, last_step):
                begun = time.perf_counter()
                micro_batches = self._prepare(epoch, number, indices)
                yield LoadedBatch(epoch, micro_batches, time.perf_counter() - begun)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="batches")
        waiting: deque[tuple[int, Future[list[Batch]]]] = deque()
        try:
            for epoch, number, indices in self._plan(first_step, last_step):
                waiting.append((epoch, pool.submit(self._prepare, epoch, number, indices)))
                if len(waiting) > self.ahead:
                    yield _take(waiting)
            while waiting:
                yield _take(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, first_step: int, last_step: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, number of the batch in it, sample indices) of each step."""
        steps = self.sampler.steps_per_epoch
        step = first_step
        while step < last_step:
            epoch, start = divmod(step, steps)
            for number, indices in enumerate(self.sampler.batches(epoch, start), start):
                if step == last_step:
                    return
                yield epoch, number, indices
                step += 1

    def _prepare(self, epoch: int, number: int, indices: np.ndarray) -> list[Batch]:
        positions = number * self.sampler.train_batch_size + np.arange(len(indices))
        parts = partition(len(indices), self.part.world_size, self.part.accumulation, self.part.rank)
        micro_batches = [self.collate(self.dataset, indices[p], positions[p], epoch) for p in parts]
        if self.pin_memory:
            micro_batches = [batch.map(Tensor.pin_memory) for batch in micro_batches]
        return micro_batches


def _take(waiting: deque[tuple[int, Future[list[Batch]]]]) -> LoadedBatch:
    epoch, future = waiting.popleft()
    begun = time.perf_counter()
    return LoadedBatch(epoch, future.result(), time.perf_counter() - begun)
