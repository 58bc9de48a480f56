"""What tokens that share a patch learn from those next to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_tokimg.diffusion.writing import RUN
from ds_tokimg.model.kernels.fused import around
from ds_tokimg.model.layers import RMSNorm, SwiGLU


class InTurn(NamedTuple):
    """Tokens that are drawn one after another: the first ones of all runs, then the second ones, …"""

    clean: Tensor  # [B, L, F], features of the tokens that were drawn; those of later turns are not looked at
    rows: Tensor | None = None  # [B] bool, texts that are drawn so; None: all

    def heard(self, distances: Tensor, places: Tensor) -> Tensor:
        """Whether tokens at these places of their blocks, [L], hear those so far away without noise, because they were
        drawn before them: bool [D, B or 1, L]."""
        earlier = ((places + distances[:, None]) % RUN < places % RUN)[:, None]
        return earlier if self.rows is None else earlier & self.rows[:, None]


class Neighbours(nn.Module):
    """What the tokens around a token say of it, straight from their features to its output.

    Tokens that share a patch share one hidden state, through which their pairs can hardly be told; here they need not.

    Args:
        reach: how many tokens on either side are heard.
        features, outputs: numbers of a token, in and out.
    """

    def __init__(self, reach: int, features: int, outputs: int):
        super().__init__()
        self.reach = reach
        self.output = nn.Linear(2 * reach * features, outputs, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        tokens: Tensor,
        before: Tensor | None = None,
        context: tuple[Tensor, Tensor] | None = None,
        in_turn: InTurn | None = None,
        wanted: slice = slice(None),
    ) -> Tensor:
        """tokens [B, L, F] -> [B, L, outputs].

        before: [B, reach, F], tokens that precede these; None: none do.
        context: (the same tokens without noise [B, L, F], blocks [L]): a token then hears the tokens of its own block,
            those of earlier blocks without noise, and none of later ones.
        in_turn: those of its own block that were drawn before it are heard without noise.
        wanted: the tokens that the result is of.
        """
        length, device = tokens.shape[1], tokens.device
        sides = [*range(-self.reach, 0), *range(1, self.reach + 1)]
        distances = torch.cat([torch.arange(*ends, device=device) for ends in ((-self.reach, 0), (1, self.reach + 1))])
        places = torch.arange(length, device=device)
        clean, without_noise, silent = None, None, None
        if context is not None:
            clean, blocks = context
            others = blocks[(places + distances[:, None]).clamp(0, length - 1)] - blocks  # [D, L]
            without_noise, silent = (others < 0)[:, None], others > 0
            places = places - torch.searchsorted(blocks, blocks)
        if in_turn is not None:
            clean, drawn = in_turn.clean, in_turn.heard(distances, places)
            without_noise = drawn if context is None else drawn & (others == 0)[:, None] | without_noise
        if before is not None:
            tokens = torch.cat([before, tokens], 1)
            clean = None if clean is None else torch.cat([before, clean], 1)
        return self.output(around(tokens, clean, without_noise, silent, sides, length, wanted))

    def last(self, tokens: Tensor, before: Tensor | None) -> Tensor:
        """Of tokens [B, L, F], after those `before`, what the next ones hear: [B, reach, F]."""
        preceding = tokens if before is None else torch.cat([before, tokens], 1)
        return F.pad(preceding, (0, 0, self.reach, 0))[:, -self.reach :]


class TokenMLP(nn.Module):
    """What follows for a token from its own features and all that was heard of it, added to its output.

    Args:
        features, outputs: numbers of a token, in and out.
        slots: tokens of a patch.
    """

    def __init__(self, features: int, outputs: int, slots: int):
        super().__init__()
        self.own = nn.Linear(features, outputs, bias=False)
        self.norm = RMSNorm(outputs)
        # Half as wide as a block's, for every token has to pay for it; where more than four share a patch, narrower,
        # or they would cost a small model more than its blocks.
        self.mlp = SwiGLU(outputs, 64 * max(1, round(outputs * 16 / 3 / max(4, slots) / 64)))
        nn.init.zeros_(self.mlp.down.weight)
        nn.init.zeros_(self.mlp.down.bias)

    def forward(self, output: Tensor, tokens: Tensor) -> Tensor:
        """output [B, L, outputs], tokens [B, L, features] -> [B, L, outputs]."""
        return output + self.mlp(self.norm(output.to(tokens.dtype) + self.own(tokens)))
