"""What the model is given to predict from: noisy patches, what they see of clean ones, and tokens that are drawn."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ds_tokimg.model.layers import Past

NOISY, CLEAN = 0, 1  # kinds of segments


# ---- what `JiT.predict` takes ----


class Patches(NamedTuple):
    """Noisy patches, N at most the image's number of patches."""

    noisy: Tensor  # [B, N, P] float32
    t: Tensor  # [B] or [B, N]
    slot_mask: Tensor  # [B, N, K] bool, slots that hold a token; patches without one are ignored by all others
    positions: Tensor | None = None  # [B, N], place of each patch in the image; None: 0, 1, 2, …

    @property
    def levels(self) -> Tensor:
        """Timesteps, [B, N or 1]."""
        return self.t if self.t.dim() == 2 else self.t[:, None]

    @property
    def places(self) -> Tensor:
        """[B, N]."""
        if self.positions is not None:
            return self.positions
        batch, count, _ = self.noisy.shape
        return torch.arange(count, device=self.noisy.device).expand(batch, count)


# Clean patches [B, M, P] that stand before the image, and their slot_mask [B, M, K].
Prompt = tuple[Tensor, Tensor]


class WholeImage(NamedTuple):
    """Every patch sees all noisy ones, and the prompt."""

    prompt: Prompt | None = None


class TeacherForced(NamedTuple):
    """All blocks at once, from left to right, as in training: a noisy patch sees the noisy patches of its own block,
    the clean ones of the blocks before it, and the prompt. Clean patches go through the whole transformer, noisy ones
    through its last `noisy_depth` layers (0: all)."""

    clean: Tensor  # [B, N, P]
    blocks: Tensor  # [N] int64, which block a patch belongs to
    prompt: Prompt | None = None


class KVCache:
    """Clean patches that the transformer has read (`JiT.prefill`), none at first: the patches to predict are those of
    the block after them. `past`: keys and values of every layer."""

    def __init__(self, depth: int, batch: int, device):
        self.past = [Past() for _ in range(depth)]
        self.valid = torch.ones(batch, 0, dtype=torch.bool, device=device)  # [B, M]
        self.shift: Tensor | None = None  # [B, 1, C], from the last patch to a clean one after it; None: nothing
        self.shift_to_noisy: Tensor | None = None  # the same, to a noisy one
        self.tokens: Tensor | None = None  # [B, reach, F], features of the last tokens for the local window
        # Noise levels [B, n] and their modulation [B, n, 6C], the last ones that were needed.
        self.modulations: list[tuple[Tensor, Tensor]] = []

    def select(self, rows: Tensor) -> KVCache:
        """Of these texts alone, bool [B]."""
        cache = copy.copy(self)
        cache.modulations = []
        cache.past = [past.select(rows) for past in self.past]
        for name in ("valid", "shift", "shift_to_noisy", "tokens"):
            value = getattr(self, name)
            setattr(cache, name, value if value is None else value[rows])
        return cache

    def for_one_pass(self) -> KVCache:
        """A copy to which a pass may add without changing this."""
        cache = copy.copy(self)
        cache.past = [past.for_one_pass() for past in self.past]
        return cache


class Drawn(NamedTuple):
    """Tokens that are drawn in turn: each is predicted with those of earlier turns known to be these."""

    ids: Tensor  # [B, N, K]
    rows: Tensor | None = None  # [B] bool, the texts whose tokens are drawn so; None: all


# ---- inside ----


class Segment(NamedTuple):
    """Patches that enter the transformer together: the prompt, the clean context, or the noisy patches."""

    kind: int  # CLEAN or NOISY
    own: Tensor  # [B, n, C], the embedding of each patch
    shifted: Tensor  # [B, n, C], what of each is shifted to the one after it
    shift: Tensor  # [B, n, C], what is shifted here from the one before, 0 where there is none
    time: Tensor  # [B, n or 1, 6C], modulation of their noise level
    valid: Tensor  # [B, n] bool
    positions: Tensor  # [B, n]
    tokens: Tensor | None  # [B, n * K, F], features of the tokens for the local window; None: it is not used


def visible_mask(valid: Tensor, blocks: Tensor | None, noisy_too: bool) -> Tensor:
    """Which positions each position may attend to: bool [B, 1, 1 or L, L].

    valid: [B, L]. blocks: of the clean, or clean and then noisy, positions at the end (`seen_from_left_to_right`);
    None: all see all valid ones.
    """
    visible = valid[:, None, :]
    if blocks is not None:
        visible = visible & seen_from_left_to_right(blocks, valid.shape[1], noisy_too)
    # A row that sees nothing valid attends to everything: its output is ignored but must stay finite.
    return (visible | ~visible.any(-1, keepdim=True))[:, None]


def seen_from_left_to_right(blocks: Tensor, length: int, noisy_too: bool) -> Tensor:
    """Who sees whom among `length` positions, bool [L, L]: a prompt, N clean and, in the end, N noisy patches.

    Everyone sees the prompt. A clean patch sees the clean ones of its own and earlier blocks, a noisy one the clean
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
