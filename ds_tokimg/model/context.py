"""What goes through the transformer together, what of it is remembered, and who sees whom."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

NOISY, CLEAN = 0, 1  # kinds of segments


class Segment(NamedTuple):
    """Patches that enter the transformer together: the condition, the clean context, or the noisy patches."""

    kind: int  # CLEAN or NOISY
    own: Tensor  # [B, n, C], the embedding of each patch
    shown: Tensor  # [B, n, C], what each shows to the one after it
    before: Tensor  # [B, n, C], what the one before it shows, 0 where there is none
    time: Tensor  # [B, n or 1, 6C], modulation of their noise level
    valid: Tensor  # [B, n] bool
    positions: Tensor  # [B, n]
    tokens: Tensor | None  # [B, n * K, F], features of the tokens for those next to them; None: not asked for


class Memory:
    """Clean patches that the transformer has read, none at first: their keys and values in every block,
    [B, heads, M, d] each, and what the last one, and the last tokens, show to a clean and to a noisy patch after it."""

    def __init__(self, depth: int, batch: int, device):
        self.past: list[list[Tensor]] = [[] for _ in range(depth)]
        self.valid = torch.ones(batch, 0, dtype=torch.bool, device=device)  # [B, M]
        self.shown: Tensor | None = None  # [B, 1, C]; None: nothing
        self.shown_to_noisy: Tensor | None = None  # the same
        self.tokens: Tensor | None = None  # [B, reach, F], features of the last tokens; None: none

    def for_one_pass(self) -> Memory:
        """A copy to which a pass may add without changing this."""
        memory = copy.copy(self)
        memory.past = [list(past) for past in self.past]
        return memory


def seen_from_left_to_right(blocks: Tensor, length: int, noisy_too: bool) -> Tensor:
    """Who sees whom among `length` positions, bool [L, L]: a condition, N clean and, in the end, N noisy patches.

    Everyone sees the condition. A clean patch sees the clean ones of its own and earlier blocks, a noisy one the clean
    ones of earlier blocks and the noisy ones of its own (Arriola et al., "Block diffusion", 2025, section 3.2).
    """
    count, device = len(blocks), blocks.device
    image = torch.cat([blocks, blocks]) if noisy_too else blocks
    block = torch.cat([torch.full((length - len(image),), -1, device=device), image])
    noisy = torch.arange(length, device=device) >= length - (count if noisy_too else 0)
    reader, seen = block[:, None], block[None, :]
    return torch.where(noisy[None, :], noisy[:, None] & (seen == reader), seen + noisy[:, None].long() <= reader)


def last_valid(x: Tensor, valid: Tensor) -> Tensor:
    """The last valid patch of each row of x [B, n, C], whose valid ones come first; 0 if there is none: [B, 1, C]."""
    count = valid.sum(1)[:, None, None]
    return x.gather(1, (count - 1).clamp(min=0).expand(-1, -1, x.shape[-1])) * (count > 0)
