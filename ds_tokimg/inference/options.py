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
        """Raises one ValueError, a line for each mistake. Values of a wrong type are not looked at any further."""
        problems = self._type_problems() or [*self._range_problems(), *self._stop_problems()]
        if problems:
            raise ValueError("\n".join(problems))

    def _type_problems(self) -> list[str]:
        kinds = {name: kind for name, kind in get_type_hints(type(self)).items() if name != "stop"}
        problems = [
            f"{NAMES.get(name, name)} is {shortened(getattr(self, name))}; "
            f"it must be {described(kind).replace('null', 'None')}"
            for name, kind in kinds.items()
            if not has_type(getattr(self, name), kind)
        ]
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            problems.append(f"stop is {shortened(self.stop)}; it must be a text, or several")
        return problems

    def _range_problems(self) -> list[str]:
        """Of numbers, and of the sampler."""
        steps, top_k, most = self.steps, self.top_k, self.max_new_tokens
        block, guidance = self.block_size, self.guidance_scale
        checks = [
            (steps is None or steps >= 1, f"num_inference_steps is {steps}; it must be at least 1"),
            (self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be at least 1"),
            (0 <= self.eta < math.inf, f"eta is {self.eta}; it must be 0 (no noise is replaced) or more"),
            (
                block is None or block >= 0,
                f"block_size is {block}; it must be 0 (the whole image at once) or more",
            ),
            (math.isfinite(guidance), f"guidance_scale is {guidance}; it must be a finite number"),
            (
                0 <= self.temperature < math.inf,
                f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more",
            ),
            (top_k is None or top_k >= 1, f"top_k is {top_k}; it must be at least 1 (leave it out for all tokens)"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)"),
            (most is None or most >= 1, f"max_new_tokens is {most}; it must be at least 1"),
        ]
        problems = [problem for holds, problem in checks if not holds]
        if self.sampler not in SAMPLERS:
            problems.append(f"unknown sampler {self.sampler!r}; available: {', '.join(SAMPLERS)}")
        elif not self.is_as_trained and self.sampler != "ancestral":
            problems.append(
                f"temperature, top_k and top_p change how tokens are drawn, and the sampler {self.sampler} draws none: "
                "leave them out, or take ancestral"
            )
        return problems

    def _stop_problems(self) -> list[str]:
        return [] if all(self.stop) else ["stop is empty: give a text of at least one character"]


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
