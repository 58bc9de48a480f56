"""Images to patches and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_tokimg.model.config import JiTConfig
from ds_tokimg.tokens.codec import TokenCodec, pixel_order


class ImagePatches:
    """What a model of patches knows of images. Values of a patch are ordered [slot, pixel, channel]."""

    codec: TokenCodec
    config: JiTConfig
    slots: int  # K, tokens a patch
    num_patches: int  # of an image

    def patchify(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> patches in rows [B, N, P]."""
        order = self._pixels(images.device)
        return images.flatten(2)[:, :, order].permute(0, 2, 3, 1).flatten(2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        size = self.config.img_size
        order = self._pixels(patches.device).flatten()
        values = patches.unflatten(-1, (-1, 3)).flatten(1, 2).transpose(1, 2)  # [B, 3, H*W] in patch order
        images = torch.empty_like(values)
        images[:, :, order] = values
        return images.view(-1, 3, size, size)

    def slot_mask(self, mask: Tensor | None, images: Tensor) -> Tensor:
        """Pixel mask [B, H, W] -> token mask [B, N, K] bool: a slot is valid if any of its pixels is."""
        if mask is None:
            return torch.ones(len(images), self.num_patches, self.slots, dtype=torch.bool, device=images.device)
        return (mask.flatten(1)[:, self._pixels(mask.device)] > 0).unflatten(-1, (self.slots, -1)).any(-1)

    def _pixels(self, device) -> Tensor:
        size, patch = self.config.img_size, self.config.patch_size
        order = pixel_order(size, self.codec.token_size, "patch", patch)
        return order.view(self.num_patches, -1).to(device)  # [N, K * token_size^2]


def mask_slots(values: Tensor, slot_mask: Tensor) -> Tensor:
    """Values [B, N, K, …] of slots, 0 where there is no token."""
    return values * slot_mask.view(slot_mask.shape + (1,) * (values.dim() - 3))


def take(patches: Tensor, index: Tensor) -> Tensor:
    """Patches [B, N, P] at these places [B, n]: [B, n, P]."""
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))


def valid_first(slot_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, n] of each row's valid patches, in order, n the largest count of the batch (at least 1; shorter rows
    are filled up with invalid ones), and their slot masks [B, n, K]."""
    valid = slot_mask.any(-1)
    count = max(1, int(valid.sum(1).max()))
    index = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :count]
    return index, slot_mask.gather(1, index[..., None].expand(-1, -1, slot_mask.shape[-1]))
