"""How texts are written: the options of the samplers. No torch, so that the help lists them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_type_hints

from ds_tokimg.choices import SAMPLERS
from ds_tokimg.errors import described, has_type, shortened

MAX_STEPS, STEPS_PER_TOKEN = 64, 4
NAMES = {"steps": "num_inference_steps"}  # of flags, where they are others


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
    temperature, top_k, top_p: of every distribution over tokens that `ancestral` draws from, in this order: its
        probabilities to the power 1 / temperature (0: the likeliest token); the top_k likeliest tokens alone (None:
        all); of these the fewest likeliest ones whose probabilities sum to top_p at least. Where a token is drawn in
        one step that is the whole story; a walk of several steps draws in each of them.
    max_new_tokens: tokens to write at most; None: as many as the image has room for.
    stop: a text ends before the first of these that it contains.
    """

    steps: int | None = None
    sampler: str = "ancestral"
    block_size: int | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int = 64
    eta: float = 3.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_as_trained(self) -> bool:
        """Tokens are drawn from the model's own distributions."""
        return self.temperature == 1 and self.top_k is None and self.top_p == 1

    def __post_init__(self):
        self._check_types()
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}; available: {', '.join(SAMPLERS)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"num_inference_steps is {self.steps}; it must be at least 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta is {self.eta}; it must be 0 (no noise is replaced) or more")
        if self.block_size is not None and self.block_size < 0:
            raise ValueError(f"block_size is {self.block_size}; it must be 0 (the whole image at once) or more")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be a finite number")
        self._check_draws()
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop is {shortened(self.stop)}; it must be a text, or several")
        if not all(self.stop):
            raise ValueError("stop is empty: give a text of at least one character")

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if name != "stop" and not has_type(value, kind):
                expected = described(kind).replace("null", "None")
                raise ValueError(f"{NAMES.get(name, name)} is {shortened(value)}; it must be {expected}")

    def _check_draws(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1 (leave it out for all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")
        if not self.is_as_trained and self.sampler != "ancestral":
            raise ValueError(
                f"temperature, top_k and top_p change how tokens are drawn, and the sampler {self.sampler} draws none: "
                "leave them out, or take ancestral"
            )


def guidance_problem(guidance_scale: float, answers: bool, has_prompt: bool) -> str | None:
    """Why a model cannot be guided, or None.

    Args:
        answers: the model was trained with conditions.
    """
    if guidance_scale == 1:
        return None
    if not answers:
        return (
            f"guidance_scale is {guidance_scale:g}, but this model was trained without conditions: "
            "leave it out, or train with --enable_condition"
        )
    if not has_prompt:
        return f"guidance_scale is {guidance_scale:g}, but there is no prompt to follow: give one"
    return None
