"""Posterior over whole tokens."""

from __future__ import annotations

from torch import Tensor, nn

from ds_tokimg.model.heads.base import MAX_TOKEN_WIDTH, CandidateTokens, full_precision
from ds_tokimg.model.kernels.posterior import TokenInput, TokenOutput
from ds_tokimg.tokens.codec import TokenCodec


class TokenHead(CandidateTokens):
    """Posterior over whole tokens, all of which are weighed. Tokens of a patch share one embedding, in and out."""

    def __init__(self, codec: TokenCodec, slots: int, width: int):
        super().__init__(codec, slots)
        token_width = min(width, MAX_TOKEN_WIDTH)
        self.features, self.outputs = slots * token_width, token_width
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
        nn.init.zeros_(self.token_output.bias)
        if isinstance(self.to_tokens, nn.Linear):
            nn.init.zeros_(self.to_tokens.weight)
            nn.init.zeros_(self.to_tokens.bias)
        else:
            nn.init.zeros_(self.token_output.weight)

    def features_of(self, evidence: Tensor) -> Tensor:
        """The posterior without context, as input: [B, N, K, token_width]."""
        return self.token_input(evidence, self.book())

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Tokens that are certain [B, N, K] -> features [B, N, K, token_width]."""
        return self.token_input(ids)

    def logits(self, output: Tensor, evidence: Tensor) -> Tensor:
        """Of the posterior given the context: [B, N, K, V], float32."""
        context = self.token_output(output).float()
        with full_precision(evidence):
            return context + evidence @ self.book().T

    def loss_sum(self, output: Tensor, evidence: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the tokens whose mask [B, N, K] is True: scalar, float32; and that of each
        token, [B, N, K], without gradient."""
        return self.token_output(output, (evidence, self.book(), ids, mask))
