"""What the validations of a run have found: the last one, and the best one so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from ds_tokimg.training.bound import Bound
from ds_tokimg.training.budget import Validations


class Scores:
    """The last validation and the best one.

    Args:
        validations: which texts are read.
        state: of the trainer, at the checkpoint that a run goes on from; {} for a new run.
        is_kept: whether the checkpoint of a step is still there; the same on all ranks.

    best: bits per token of the best one, inf before the first; best_step: its step. bound: the last one of this launch,
    None before it. figures: of the last one, for the model card of an export. compares: whether those of earlier
    launches read the same texts.
    """

    def __init__(self, validations: Validations, state: dict, is_kept: Callable[[int], bool]):
        self.validations, self.is_kept = validations, is_kept
        self.compares = state.get("best") is None or validations.were(state)
        self.bound: Bound | None = None
        self.figures = state.get("figures")
        self.go_back(state)

    def go_back(self, state: dict) -> None:
        """To the best one before a checkpoint. One whose own checkpoint is gone (of a branch that the run goes back
        to), or that read other texts, counts no more: a new best is found."""
        self.best, self.best_step = math.inf, None
        if state.get("best") is None or not self.validations.were(state):
            return
        step = state.get("best_step")
        if step is None or self.is_kept(step):
            self.best, self.best_step = state["best"], step

    def add(self, bound: Bound, step: int) -> bool:
        """Whether it is the best so far. Compared are always the same texts, also where this one has read more."""
        self.bound, self.figures = bound, {"step": step, **bound.figures()}
        value = bound.bits_of_first(self.validations.count)
        if not value < self.best:
            return False
        self.best, self.best_step = value, step
        return True

    def state(self) -> dict:
        """A part of the trainer's state."""
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "bits_per_token": self.bound.bits_per_token if self.bound else None,
            "figures": self.figures,
        }


def row_of(bound: Bound, unigram_entropy: float) -> dict:
    """What metrics.jsonl says of a validation."""
    return {
        "val_tokens": int(bound.tokens.sum()),
        "val_loss": bound.loss,
        "val_bits_per_token": bound.bits_per_token,
        "val_bits_per_token_error": bound.standard_error,
        "val_bits_per_byte": bound.bits_per_byte,
        "val_token_accuracy": bound.accuracy_per_level,
        "val_loss_by_noise": bound.loss_per_level,
        "val_bits_by_noise": bound.bits_per_level,
        "val_unigram_entropy": unigram_entropy,
    }
