"""How a text of a model is written: decided once, and stored with the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Tokens that are drawn one after another, by models that have learnt it: runs of so many, side by side. Longer ones
# gain next to nothing.
RUN = 16


@dataclass(frozen=True)
class Writing:
    """How a text is written: training's log, the bound and the sampler all go by it.

    block_size: patches that lose their noise together, one block after another from left to right; 0: the whole image
        at once.
    in_turn: at the end of the walk tokens are drawn one after another, in runs of RUN side by side, each given those
        drawn before it. Else all are read off the cleanest state together.
    exact_patches: patches of the largest block that a single step from pure noise draws exactly; 0: none is.
    """

    block_size: int = 0
    in_turn: bool = False
    exact_patches: int = 0

    def __post_init__(self):
        if self.block_size < 0:
            raise ValueError(f"block_size is {self.block_size}; it must be 0 (the whole image at once) or more")

    @classmethod
    def of_model(cls, block_size: int, slots: int, in_turn: bool, whole_tokens: bool) -> Writing:
        """Decides how a model writes.

        The first posterior over whole tokens, at full noise, is already the right one to draw a token from that is
        alone in its block, or tokens in turn that are one run.

        Args:
            block_size: that of training.
            slots: tokens of a patch.
            in_turn: the model has learnt to draw tokens in turn.
            whole_tokens: its head has a posterior over whole tokens, not one over each of their digits.
        """
        tokens = RUN if in_turn else 1
        return cls(block_size, in_turn, tokens // slots if whole_tokens else 0)

    @property
    def one_step(self) -> bool:
        """A block is drawn in a single step from pure noise."""
        return 0 < self.block_size <= self.exact_patches

    def asked(self, block_size: int | None = None, many_steps: bool = False) -> Writing:
        """What it becomes when a caller wants blocks of another size (None: does not), or many small steps from noise
        to the end instead of drawing tokens before. Raises ValueError for a negative size."""
        writing = self if block_size is None else replace(self, block_size=block_size)
        return replace(writing, in_turn=False, exact_patches=0) if many_steps else writing

    def told_by_training(self, timesteps: str) -> Writing:
        """The way of writing whose bits the steps of training tell: this, or that of many small steps. Of tokens that
        are drawn in turn, only `noisy` timesteps train the level where they are, and only where that is pure noise."""
        if self.in_turn and not (self.one_step and timesteps == "noisy"):
            return self.asked(many_steps=True)
        return self
