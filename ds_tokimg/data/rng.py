"""Random numbers that depend on what a sample is, never on which rank computes it.

Every draw of a training or validation sample comes from a counter-based generator (Philox 4x64, Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by (seed, stream, epoch, index). Ranks, micro-batches,
worker threads and restarts can then be rearranged at will: the sample still sees the same noise.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a draw is for; each purpose has a stream of its own. The numbers stay: a seed gives what it gave."""

    NOISE = 0
    TIMESTEP = 1
    CONDITION_DROP = 2
    CANVAS = 4
    VALIDATION = 5
    GENERATION = 6
    VALIDATION_TEXTS = 7


_MASK = (1 << 64) - 1


def generator(seed: int, stream: Stream, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """A fresh generator for one (seed, stream, epoch, index); equal arguments give equal draws on every machine.

    A longer draw starts with the same numbers as a shorter one, so a sample's noise does not depend on how far its
    batch was padded.
    """
    key = np.array([seed & _MASK, (int(stream) << 48) | (epoch & 0xFFFF_FFFF_FFFF)], dtype=np.uint64)
    # The key selects the generator, the counter its block: an index owns 2^128 blocks of its own.
    counter = np.array([0, 0, index & _MASK, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def low_discrepancy(seed: int, stream: Stream, epoch: int, positions: np.ndarray) -> np.ndarray:
    """Points in [0, 1) for consecutive positions of an epoch: any window of them covers the interval evenly.

    The additive golden-ratio sequence (Kronecker): it stratifies a train batch without knowing where the batch starts
    or how large it is, which a grid per batch would have to. `positions` int [n]; returns float64 [n].
    """
    offset = generator(seed, stream, epoch, _MASK).random()
    golden = 0.6180339887498949
    return (offset + np.asarray(positions, dtype=np.float64) * golden) % 1.0
