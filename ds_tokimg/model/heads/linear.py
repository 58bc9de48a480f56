"""The plain JiT output, for the `reference` recipe."""

from __future__ import annotations

from torch import Tensor, nn

from ds_tokimg.tokens.codec import TokenCodec


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
