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

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.codec import TokenCodec
from ds_tokimg.posterior import TokenInput, TokenOutput

# Noise below this is treated as this: finite log-likelihoods for clean patches, and still hundreds of nats between
# neighbouring levels of the finest code (radix 256).
MIN_SIGMA = 1e-4
# Numbers that stand for a token, in and out: enough that a thousand tokens are told apart from the start, few enough
# that the head of a wide model with many tokens a patch costs less than its blocks.
MAX_TOKEN_WIDTH = 192


class DigitHead(nn.Module):
    """Posterior over the levels of every digit. Logits are [B, N, K, D, radix]."""

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__()
        self.shape = (slots, codec.digits_per_token, codec.radix)
        self.radix = codec.radix
        self.features = math.prod(self.shape)
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
        return self.embed(evidence.softmax(-1))

    def embed(self, probabilities: Tensor) -> Tensor:
        """[B, N, K, D, radix] -> features [B, N, K, D * radix]."""
        return probabilities.flatten(3)

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

    def colours(self, digits: Tensor) -> Tensor:
        """Chosen digits [B, N, K, D] -> clean patches [B, N, P]."""
        return self.levels(digits.device)[digits].flatten(2)


class TokenHead(nn.Module):
    """Posterior over whole tokens. Logits are [B, N, K, V]. Tokens of a patch share one embedding, in and out."""

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__()
        token_width = min(width, MAX_TOKEN_WIDTH)
        self.slots, self.radix, self.digits_per_token = slots, codec.radix, codec.digits_per_token
        self.features = slots * token_width
        self.register_buffer("digit_table", codec.digit_table, persistent=False)  # [V, D] uint8, see DigitHead
        self.token_input = TokenInput(codec.vocab_size, token_width, bias=False)
        # A product of two matrices learns slower than one: where the hidden state has the tokens' width, it is they.
        is_direct = slots * token_width == width
        self.to_tokens = nn.Identity() if is_direct else nn.Linear(width, slots * token_width)
        self.token_output = TokenOutput(token_width, codec.vocab_size)
        # A token alone in its patch outweighs the noise of the raw values from the start. Tokens that share a patch
        # mix anyhow, and learn sooner when steps of the usual size move them far. (Each is worse off with the other.)
        nn.init.normal_(self.token_input.weight, std=3.0 if slots == 1 else 0.2)
        nn.init.normal_(self.token_output.weight, std=token_width**-0.5)
        # At first the context says nothing.
        nn.init.zeros_(self.token_output.weight if is_direct else self.to_tokens.weight)
        nn.init.zeros_(self.token_output.bias)
        if not is_direct:
            nn.init.zeros_(self.to_tokens.bias)

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

    def features_of(self, evidence: Tensor) -> Tensor:
        """The posterior without context, as input: [B, N, K, token_width]."""
        return self.token_input(evidence, self.book())

    def embed(self, probabilities: Tensor) -> Tensor:
        """[B, N, K, V] -> features [B, N, K, token_width]."""
        return self.token_input(probabilities)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the context says of the tokens: [B, N, C] -> [B, N, K, token_width]."""
        return self.to_tokens(hidden).unflatten(-1, (self.slots, -1))

    def logits(self, output: Tensor, evidence: Tensor) -> Tensor:
        """Of the posterior given the context: [B, N, K, V], float32."""
        context = self.token_output(output).float()
        with full_precision(evidence):
            return context + evidence @ self.book().T

    def loss_sum(self, output: Tensor, evidence: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the tokens whose mask [B, N, K] is True: scalar, float32; and that of each
        token, [B, N, K], without gradient."""
        return self.token_output(output, (evidence, self.book(), ids, mask))

    def clean(self, logits: Tensor) -> Tensor:
        """The posterior mean, [B, N, P] in [-1, 1]."""
        with full_precision(logits):
            return (logits.softmax(-1) @ self.codebook()).flatten(2)

    def colours(self, ids: Tensor) -> Tensor:
        """Chosen tokens [B, N, K] -> clean patches [B, N, P]."""
        return self.codebook()[ids].flatten(2)


class LinearHead(nn.Module):
    """The plain JiT output (baseline): colours by regression, no candidates."""

    features = 0

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__()
        self.output = nn.Linear(width, slots * codec.digits_per_token)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, N, C] -> clean patches [B, N, P], float32."""
        return self.output(hidden).float()


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
