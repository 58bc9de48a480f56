"""How texts fall into patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ds_tokimg.tokens.codec import TokenCodec, token_of_slot


@dataclass(frozen=True)
class PatchLayout:
    """How texts of n tokens fall into patches of K slots."""

    codec: TokenCodec
    img_size: int
    patch_size: int
    layout: str = "patch"

    @property
    def slots(self) -> int:
        """K, tokens a patch."""
        return (self.patch_size // self.codec.token_size) ** 2

    @property
    def values(self) -> int:
        """P, channel values a patch."""
        return self.slots * self.codec.digits_per_token

    @property
    def order(self) -> Tensor:
        """[patches, K]: which token a slot holds."""
        return token_of_slot(self.img_size, self.codec.token_size, self.layout, self.patch_size)

    def num_patches(self, lengths: ArrayLike) -> np.ndarray:
        """Patches that texts of these lengths touch (always the first ones), int [n]."""
        lengths = np.asarray(lengths)
        if self.layout == "patch":
            return -(-lengths // self.slots)
        return np.searchsorted(self.order.amin(1).numpy(), lengths)

    def pack(self, texts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Texts -> ids [B, N, K] int64 (0 in padding) and mask [B, N, K] bool; N of the longest, at least 1.

        Raises ValueError when a text is longer than the image's capacity.
        """
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        if lengths.max(initial=0) > self.order.numel():
            raise ValueError(f"a text of {lengths.max()} tokens does not fit into an image of {self.order.numel()}")
        order = self.order[: max(1, int(self.num_patches(lengths).max(initial=0)))]  # [N, K]
        padded = np.zeros((len(texts), int(order.max()) + 1), dtype=np.int64)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        mask = order < torch.from_numpy(lengths)[:, None, None]
        return torch.from_numpy(padded)[:, order], mask
