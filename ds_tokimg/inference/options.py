"""How texts are written: the options of the samplers. No torch, so that the help lists them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_tokimg.choices import SAMPLERS

MAX_STEPS, STEPS_PER_TOKEN = 64, 4


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    steps: network evaluations, of every block (two a step for `heun`, so half as many steps); None: MAX_STEPS, or, if
        these are fewer, STEPS_PER_TOKEN for each token of a block; 1 for a block of one token, or of one run of tokens
        that are drawn in turn, from which `ancestral` draws: the first posterior is already the right one.
    block_size: patches that are written together, each block after the one before it; 0: the whole image at once;
        None: as the model's texts are written (`Writing`).
    guidance_scale: 1 follows the condition as trained; above 1 exaggerates it (classifier-free guidance, Ho &
        Salimans 2022), 0 ignores it. Other values than 0 and 1 cost two evaluations a step.
    eta: how much of the noise `ancestral` replaces in a step, as a multiple of what q(z_s | z_t, clean) does; at most
        all of it. The others replace none.
    """

    steps: int | None = None
    sampler: str = "ancestral"
    block_size: int | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int = 64
    eta: float = 3.0

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}; available: {', '.join(SAMPLERS)}")
        if (self.steps is not None and self.steps < 1) or self.batch_size < 1:
            raise ValueError("steps and batch_size must be at least 1")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta is {self.eta}; it must be 0 (no noise is replaced) or more")
        if self.block_size is not None and self.block_size < 0:
            raise ValueError("block_size must be 0 (the whole image at once) or more")
