"""Posterior over the digits of a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ds_tokimg.model.heads.base import MIN_SIGMA, cross_entropy, full_precision
from ds_tokimg.tokens.codec import TokenCodec


class DigitHead(nn.Module):
    """Posterior over the levels of every digit. Logits are [B, N, K, D, radix]."""

    digit_table: Tensor

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__()
        self.shape = (slots, codec.digits_per_token, codec.radix)
        self.radix = codec.radix
        self.features = math.prod(self.shape)
        self.outputs = self.features // slots  # numbers of a token
        # Integers, because an engine in half precision casts floating-point buffers.
        self.register_buffer("digit_table", codec.digit_table, persistent=False)  # [V, D] uint8
        self.output = nn.Linear(width, self.features)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def levels(self, device) -> Tensor:
        return torch.linspace(-1.0, 1.0, self.radix, device=device)

    def log_likelihood(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """noisy [B, N, P], alpha and sigma broadcasting to [B, N, 1] -> [B, N, K, D, radix], up to a constant."""
        z = noisy.unflatten(-1, self.shape[:2])[..., None]  # [B, N, K, D, 1]
        alpha, sigma = alpha[..., None, None, None], sigma[..., None, None, None].clamp(min=MIN_SIGMA)
        return -0.5 * ((z - alpha * self.levels(noisy.device)) / sigma) ** 2

    def evidence(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a noisy patch says, in the form that `features_of`, `logits` and `loss_sum` take."""
        return self.log_likelihood(noisy, alpha, sigma)

    def features_of(self, evidence: Tensor) -> Tensor:
        """The posterior without context, as input: [B, N, K, features / K]."""
        return evidence.softmax(-1).flatten(3)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the context adds to the log-likelihood: [B, N, C] -> [B, N, K, D, radix], float32."""
        return self.output(hidden).float().unflatten(-1, self.shape)

    def logits(self, output: Tensor, evidence: Tensor) -> Tensor:
        """Of the posterior given the context: [B, N, K, D, radix]."""
        return output + evidence

    def loss_sum(self, output: Tensor, evidence: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the tokens whose mask [B, N, K] is True: scalar, float32; and that of each
        token, [B, N, K], without gradient."""
        losses = cross_entropy(self.logits(output, evidence), ids, self.digit_table) * mask
        return losses.sum(), losses.detach()

    def clean(self, logits: Tensor) -> Tensor:
        """The posterior mean, [B, N, P] in [-1, 1]."""
        with full_precision(logits):
            return (logits.softmax(-1) @ self.levels(logits.device)).flatten(2)

    def token_logits(self, logits: Tensor) -> Tensor:
        """Of digits [n, D, radix] -> log-probabilities of the tokens, [n, V] float32, up to a constant: those of their
        digits, summed. (Codes of no token are left out: what remains is the distribution over the vocabulary.)"""
        digits = logits.log_softmax(-1)
        table = self.digit_table.long()  # [V, D]
        total = digits[:, 0, table[:, 0]]
        for k in range(1, table.shape[1]):
            total += digits[:, k, table[:, k]]
        return total

    def colours(self, digits: Tensor) -> Tensor:
        """Chosen digits [B, N, K, D] -> clean patches [B, N, P]."""
        return self.levels(digits.device)[digits].flatten(2)
