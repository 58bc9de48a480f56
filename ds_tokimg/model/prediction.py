"""What the model says about patches, for the loss, the bound and the samplers to ask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor, nn

from ds_tokimg.diffusion.writing import RUN
from ds_tokimg.model.heads.base import cross_entropy


class Prediction:
    """What the model says about patches. All but what the network put out is computed when it is asked for.

    logits: float32 [B, N, K, V] or [B, N, K, D, radix]; None for the linear head.
    clean: the posterior mean (linear head: its output), float32 [B, N, P].

    Args:
        output: of the network, for the head: [B, N, K, …] or [B, N, P]; or a function that computes it.
        evidence: see `heads`; None for the linear head.
        output_in_turn: a function of a turn and the ids [B, N, K] drawn in the turns before it, which gives the output
            for that turn's tokens [B, n, …]; None: the model has not learnt to draw tokens in turn.
    """

    def __init__(
        self,
        head: nn.Module,
        output: Tensor | Callable[[], Tensor] | None,
        evidence: Tensor | None,
        output_in_turn: Callable[[int, Tensor], Tensor] | None = None,
    ):
        self._head, self._given_output, self._evidence = head, output, evidence
        self._output_in_turn = output_in_turn

    @classmethod
    def of_logits(cls, head: nn.Module, logits: Tensor) -> Prediction:
        prediction = cls(head, None, None)
        prediction.logits = logits
        return prediction

    @cached_property
    def _output(self) -> Tensor | None:
        return self._given_output() if callable(self._given_output) else self._given_output

    @cached_property
    def logits(self) -> Tensor | None:
        return None if self._evidence is None else self._head.logits(self._output, self._evidence)

    @cached_property
    def clean(self) -> Tensor:
        return self._output if self.logits is None else self._head.clean(self.logits)

    @property
    def is_in_turn(self) -> bool:
        """`logits_in_turn` can be asked for."""
        return self._output_in_turn is not None

    def logits_in_turn(self, turn: int, ids: Tensor) -> Tensor:
        """Of the tokens of one turn (every RUN-th one of the text, from this one on), given those drawn in the turns
        before it, ids [B, N, K]: [B, n, V]."""
        return self._head.logits(self._output_in_turn(turn, ids), self._evidence.flatten(1, 2)[:, turn::RUN])

    def likeliest(self) -> Tensor:
        """The likeliest candidates, indices along the last axis of the logits (of a tree, by the likelier half at every
        node)."""
        if "logits" in self.__dict__ or not hasattr(self._head, "walk"):
            return self.logits.argmax(-1)
        return self._head.walk(self._output, self._evidence)

    def loss_sum(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of ids [B, N, K] in nats, summed over valid tokens, and that of each token, without gradient:
        cheaper than through the logits, unless these are there anyway."""
        if "logits" in self.__dict__:
            losses = cross_entropy(self.logits, ids, self._head.digit_table) * mask
            return losses.sum(), losses.detach()
        return self._head.loss_sum(self._output, self._evidence, ids, mask)


class ChangedPrediction(Prediction):
    """One whose logits follow from those of others.

    Args:
        change: a function of a slice of a text's tokens [B, N * K] and, for these, the logits of the others.
    """

    def __init__(self, head: nn.Module, change: Callable[..., Tensor], *others: Prediction):
        super().__init__(head, None, None)
        self._change, self._others = change, others

    @cached_property
    def logits(self) -> Tensor:
        logits = [other.logits for other in self._others]
        changed = self._change(slice(None), *[value.flatten(1, 2) for value in logits])
        return changed.view(logits[0].shape)

    @property
    def is_in_turn(self) -> bool:
        return all(other.is_in_turn for other in self._others)

    def logits_in_turn(self, turn: int, ids: Tensor) -> Tensor:
        logits = [other.logits_in_turn(turn, ids) for other in self._others]
        return self._change(slice(turn, None, RUN), *logits)
