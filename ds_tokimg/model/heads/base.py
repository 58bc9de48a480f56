"""What goes into the transformer beside the raw pixels, and how its output becomes a prediction of the clean image.

A noisy channel value z = alpha x + sigma noise has a known likelihood under every level x of the code. The posterior
heads hand this to the network as input (softmax of the log-likelihoods) and add it to its output, so that the network
only has to learn what the *context* says (the matched filter; cf. Chen et al., "Analog Bits", 2022, for digits as
targets):

    logits     = network(z, t, ...) + log_likelihood(z | candidate)
    clean_pred = sum softmax(logits) * colour(candidate)                 the posterior mean, in [-1, 1]

The candidates are the `radix` levels of a digit (`digits`, any vocabulary) or all V tokens (`tokens`, which also
knows how the digits of a token hang together; small vocabularies). All of it is computed in float32 whatever the
engine's precision. Patch values are ordered [slot, digit]: P = K * D.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.diffusion.writing import RUN
from ds_tokimg.tokens.codec import TokenCodec

# Noise below this is treated as this: finite log-likelihoods for clean patches, and still hundreds of nats between
# neighbouring levels of the finest code (radix 256).
MIN_SIGMA = 1e-4
# Numbers that stand for a token, in and out: enough that a thousand tokens are told apart from the start, few enough
# that the head of a wide model with many tokens a patch costs less than its blocks.
MAX_TOKEN_WIDTH = 192


class CandidateTokens(nn.Module):
    """What posteriors over whole tokens share. Logits are [B, N, K, V], up to a constant a token; `to_tokens` takes the
    hidden state [B, N, C] to the tokens of a patch [B, N, K * token_width]."""

    digit_table: Tensor
    to_tokens: nn.Module

    def __init__(self, codec: TokenCodec, slots: int):
        super().__init__()
        self.slots, self.radix, self.digits_per_token = slots, codec.radix, codec.digits_per_token
        self.register_buffer("digit_table", codec.digit_table, persistent=False)  # [V, D] uint8, see DigitHead

    def codebook(self) -> Tensor:
        """Colours of the tokens, [V, D] float32."""
        return self.digit_table.float() * (2.0 / (self.radix - 1)) - 1.0

    def evidence(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a noisy patch says: [B, N, K, D + 1], whose products with `book` are the log-likelihoods."""
        z = noisy.unflatten(-1, (self.slots, self.digits_per_token))  # [B, N, K, D]
        # A larger floor than the digits': the expanded square cancels in float32.
        alpha, sigma = alpha[..., None, None], sigma[..., None, None].clamp(min=10 * MIN_SIGMA)
        square = ((alpha / sigma) ** 2).expand(*z.shape[:-1], 1)
        return torch.cat([z * (alpha / sigma**2), square], -1)

    def book(self) -> Tensor:
        """The candidates as `evidence` meets them: colour and minus half its squared norm, [V, D + 1]."""
        book = self.codebook()
        return torch.cat([book, -0.5 * book.square().sum(-1, keepdim=True)], -1)

    def log_likelihood(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """noisy [B, N, P], alpha and sigma broadcasting to [B, N, 1] -> [B, N, K, V], up to a constant."""
        with full_precision(noisy):
            return self.evidence(noisy, alpha, sigma) @ self.book().T

    def forward(self, hidden: Tensor) -> Tensor:
        """What the context says of the tokens: [B, N, C] -> [B, N, K, token_width]."""
        return self.to_tokens(hidden).unflatten(-1, (self.slots, -1))

    def clean(self, logits: Tensor) -> Tensor:
        """The posterior mean, [B, N, P] in [-1, 1]."""
        with full_precision(logits):
            return (logits.softmax(-1) @ self.codebook()).flatten(2)

    def colours(self, ids: Tensor) -> Tensor:
        """Chosen tokens [B, N, K] -> clean patches [B, N, P]."""
        return self.codebook()[ids].flatten(2)


def full_precision(like: Tensor) -> torch.autocast:
    """Switches autocast off: it would round the operands of a matrix product to half precision."""
    return torch.autocast(like.device.type, enabled=False)


def cross_entropy(logits: Tensor, ids: Tensor, digit_table: Tensor) -> Tensor:
    """-log p(token) in nats of logits [B, N, K, V] or [B, N, K, D, radix] (digits summed) -> [B, N, K]."""
    if logits.dim() == 4:
        return F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(ids.shape)
    digits = digit_table[ids].long()  # [B, N, K, D]
    losses = F.cross_entropy(logits.flatten(0, 3), digits.flatten(), reduction="none")
    return losses.view(digits.shape).sum(-1)


class Prediction:
    """What the model says about patches. All but what the network put out is computed when it is asked for.

    logits: float32 [B, N, K, V] or [B, N, K, D, radix]; None for the linear head.
    clean: the posterior mean (linear head: its output), float32 [B, N, P].

    Args:
        output: of the network, for the head: [B, N, K, …] or [B, N, P]; or a function that computes it.
        evidence: see `CandidateTokens`; None for the linear head.
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

    def likeliest(self) -> Tensor:
        return self.logits.argmax(-1)

    @property
    def is_in_turn(self) -> bool:
        return all(other.is_in_turn for other in self._others)

    def logits_in_turn(self, turn: int, ids: Tensor) -> Tensor:
        logits = [other.logits_in_turn(turn, ids) for other in self._others]
        return self._change(slice(turn, None, RUN), *logits)
