"""From samples to train batches: which samples, which rank computes which, and a thread that prepares the next ones.

The order of the samples depends on (seed, epoch, train batch size) alone. Ranks and micro-batches only decide
who computes what, so any of them sees the same train batches, and a restart goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import itertools
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
from ds_tokimg.data.stream import Place, TextStream


@dataclass(frozen=True)
class LoadedBatch:
    """One rank's share of a train batch.

    samples: of the whole train batch. place: of a stream, what to go on from behind it. wait_seconds: how long the
    consumer stood still for it.
    """

    epoch: int
    samples: np.ndarray
    micro_batches: list[Batch]
    wait_seconds: float
    place: Place | None = None


@dataclass(frozen=True)
class _Planned:
    """A train batch that is not made yet.

    draws: what keys the draws of its samples together with their numbers: the epoch, or the window of a stream.
    number: of the batch among those of the same `draws`.
    """

    dataset: Any
    size: int  # samples of the data set
    epoch: int
    draws: int
    number: int
    indices: np.ndarray
    place: Place | None = None


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

    place: of a stream, where the next `batches` begin; None for its beginning.
    """

    place: Place | None = None

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
        with contextlib.closing(self._plan(first_step, last_step)) as plan:
            yield from self._one_by_one(plan) if self.num_workers == 0 else self._ahead(plan)

    def _one_by_one(self, plan: Iterator[_Planned]) -> Iterator[LoadedBatch]:
        begun = time.perf_counter()
        for planned in plan:
            micro_batches = self._prepare(planned)
            yield _loaded(planned, micro_batches, time.perf_counter() - begun)
            begun = time.perf_counter()

    def _ahead(self, plan: Iterator[_Planned]) -> Iterator[LoadedBatch]:
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="batches")
        waiting: deque[tuple[_Planned, Future[list[Batch]]]] = deque()
        begun = time.perf_counter()
        try:
            for planned in plan:
                waiting.append((planned, pool.submit(self._prepare, planned)))
                if len(waiting) > self.ahead:
                    yield _take(waiting, begun)
                    begun = time.perf_counter()
            while waiting:
                yield _take(waiting, begun)
                begun = time.perf_counter()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, first_step: int, last_step: int) -> Generator[_Planned, None, None]:
        """The batch of each step."""
        steps = self.sampler.steps_per_epoch
        step = first_step
        while step < last_step:
            epoch, start = divmod(step, steps)
            for number, indices in enumerate(self.sampler.batches(epoch, start), start):
                if step == last_step:
                    return
                yield _Planned(self.dataset, len(self.sampler.lengths), epoch, epoch, number, indices)
                step += 1

    def _prepare(self, planned: _Planned) -> list[Batch]:
        indices = planned.indices
        positions = planned.number * self.sampler.train_batch_size + np.arange(len(indices))
        parts = partition(len(indices), self.part.world_size, self.part.accumulation, self.part.rank)
        micro_batches = [self.collate(planned.dataset, indices[p], positions[p], planned.draws) for p in parts]
        if self.pin_memory:
            micro_batches = [batch.map(Tensor.pin_memory) for batch in micro_batches]
        return micro_batches


class StreamLoader(BatchLoader):
    """The same for a stream, which knows the way from one place on, not a step's number.

    Args:
        stream: of the texts.
        train_batch_size: samples per optimiser step, over all ranks.
        collate, part, options: as those of `BatchLoader`.
    """

    def __init__(
        self, stream: TextStream, train_batch_size: int, collate: Callable[..., Batch], part: Part = ALL, **options: Any
    ):
        sampler = TrainBatchSampler(
            stream.sample.lengths, train_batch_size, stream.seed
        )  # that of each window is alike
        super().__init__(stream.sample, sampler, collate, part, **options)
        self.stream = stream

    def _plan(self, first_step: int, last_step: int) -> Generator[_Planned, None, None]:
        ahead = self.num_workers > 0
        with contextlib.closing(
            self.stream.batches(self.place or Place(), self.sampler.train_batch_size, ahead)
        ) as batches:
            for dataset, indices, place in itertools.islice(batches, last_step - first_step):
                yield _Planned(dataset, len(dataset), place.epoch, place.window, place.batch - 1, indices, place)


def _take(waiting: deque[tuple[_Planned, Future[list[Batch]]]], begun: float) -> LoadedBatch:
    planned, future = waiting.popleft()
    return _loaded(planned, future.result(), time.perf_counter() - begun)


def _loaded(planned: _Planned, micro_batches: list[Batch], waited: float) -> LoadedBatch:
    samples = planned.indices % planned.size
    return LoadedBatch(planned.epoch, samples, micro_batches, waited, planned.place)
