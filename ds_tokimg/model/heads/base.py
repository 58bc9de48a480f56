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


def draws_in_one_step(head: nn.Module, block_size: int, in_turn: bool = False) -> bool:
    """Blocks of so many patches are one token each, of which the head has a posterior, or tokens that are drawn in turn
    (one run of them): the first posterior, at full noise, is already the right one to draw from."""
    return isinstance(head, CandidateTokens) and 0 < block_size * head.slots <= (RUN if in_turn else 1)


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
