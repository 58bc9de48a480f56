"""Token ids <-> pixels: the codec, the two layouts, PNG files.

A token is written as `digits_per_token = 3 * token_size**2` digits in base `radix`, least significant digit first:
red, green, blue of the cell's first pixel, then of its next pixel, row by row. Digit d is the channel value (level)
`2 d / (radix - 1) - 1`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ds_tokimg.choices import LAYOUTS
from ds_tokimg.errors import value_problems

LARGEST_IMAGE = 4096  # pixels a side: 16 million tokens
LARGEST_TABLE = 1 << 30  # digits of all ids together


@lru_cache(maxsize=32)
def pixel_order(img_size: int, token_size: int, layout: str, patch_size: int) -> Tensor:
    """Where each cell's pixels are: int64 [capacity, token_size**2], indices into the flattened H*W image.

    `raster`: cells follow the rows of the image. `patch`: patch after patch (rows of patches), and inside a patch its
    rows of cells, so that one patch holds consecutive tokens.
    """
    check_geometry(img_size, token_size, layout, patch_size)
    pixels = torch.arange(img_size * img_size).view(img_size, img_size)
    unit = patch_size if layout == "patch" else img_size
    across, cells = img_size // unit, unit // token_size
    grid = pixels.view(across, cells, token_size, across, cells, token_size)
    # [patch row, patch column, cell row, cell column, pixel row, pixel column]
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, token_size**2)


@lru_cache(maxsize=32)
def token_of_slot(img_size: int, token_size: int, layout: str, patch_size: int) -> Tensor:
    """Which token stands where in the patches: int64 [patches, slots]. For `patch` simply 0, 1, 2, …

    The transformer always sees patches in rows and the cells of a patch in rows (slots); only which token a slot
    holds differs between the layouts.
    """
    by_patch = pixel_order(img_size, token_size, "patch", patch_size)[:, 0]
    by_token = pixel_order(img_size, token_size, layout, patch_size)[:, 0]
    token_at_pixel = torch.empty(img_size * img_size, dtype=torch.int64)
    token_at_pixel[by_token] = torch.arange(len(by_token))
    return token_at_pixel[by_patch].view(-1, (patch_size // token_size) ** 2)


def check_geometry(img_size: int, token_size: int, layout: str, patch_size: int) -> None:
    """Raises ValueError when cells, patches and image do not fit into each other."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; available: {', '.join(LAYOUTS)}")
    if min(img_size, token_size, patch_size) < 1:
        raise ValueError("img_size, token_size and patch_size must be at least 1")
    if img_size > LARGEST_IMAGE:
        raise ValueError(f"img_size is {img_size}: at most {LARGEST_IMAGE}")
    if patch_size % token_size:
        raise ValueError(f"patch_size {patch_size} is not a multiple of token_size {token_size}")
    if img_size % patch_size:
        raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")


class TokenCodec:
    """The bijection between token ids and pixel levels.

    Args:
        vocab_size: V, number of token ids (ids are 0 … V-1).
        token_size: a token fills a cell of token_size x token_size pixels.
        radix: levels a channel; None picks the smallest base that can write V ids. 256 is the reference system's code.
        palette: a permutation of range(V), `palette[id]` = the number that is written for the id; None writes ids as
            they come. See `ds_tokimg.tokens.palette` for the one that is learned from a corpus.

    Raises ValueError when a value is out of range or the base is too small for V.
    """

    def __init__(
        self, vocab_size: int, token_size: int = 1, radix: int | None = None, palette: ArrayLike | Tensor | None = None
    ):
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {vocab_size}")
        if token_size < 1:
            raise ValueError(f"token_size must be at least 1, not {token_size}")
        digits = 3 * token_size**2
        if vocab_size * digits > LARGEST_TABLE:
            raise ValueError(f"{vocab_size} ids of {digits} digits each are more than a codec can hold in memory")
        if radix is None:
            radix = _smallest_radix(vocab_size, digits)
        if not 2 <= radix <= 256:
            raise ValueError(
                f"radix must be between 2 and 256 (a PNG channel has 256 levels), not {radix}; "
                f"{vocab_size} ids in {digits} digits need {_smallest_radix(vocab_size, digits)}"
            )
        if radix**digits < vocab_size:
            raise ValueError(
                f"radix {radix} writes only {radix**digits} tokens in {digits} digits, but the vocabulary has "
                f"{vocab_size}; use at least {_smallest_radix(vocab_size, digits)} or a larger token_size"
            )
        self.vocab_size, self.token_size, self.radix = vocab_size, token_size, radix
        self.digits_per_token = digits
        self.levels = torch.linspace(-1.0, 1.0, radix)  # [radix]
        self.palette = _as_permutation(palette, vocab_size)
        codes = torch.arange(vocab_size) if self.palette is None else self.palette
        # A power above V marks digits that no valid id uses; the cap keeps the sum inside int64 for every radix.
        self._powers = torch.tensor([min(radix**k, 1 << 40) for k in range(digits)], dtype=torch.int64)
        self.digit_table = self._digits(codes)  # [V, D] uint8
        self.codebook = self.levels[self.digit_table.int()]  # [V, D] float32: the colour of each id
        self._id_of_code = None if self.palette is None else torch.argsort(self.palette)

    def _digits(self, codes: Tensor) -> Tensor:
        table = torch.empty(len(codes), self.digits_per_token, dtype=torch.uint8)
        rest = codes.clone()
        for k in range(self.digits_per_token):
            table[:, k] = rest % self.radix
            rest //= self.radix
        return table

    def __repr__(self) -> str:
        palette = "id" if self.palette is None else "learned"
        return (
            f"TokenCodec(vocab_size={self.vocab_size}, token_size={self.token_size}, radix={self.radix}, "
            f"palette={palette})"
        )

    def capacity(self, img_size: int = 64) -> int:
        """Tokens an image of img_size x img_size pixels holds."""
        return (img_size // self.token_size) ** 2

    def encode(
        self, ids: ArrayLike, img_size: int = 64, layout: str = "patch", patch_size: int = 4
    ) -> tuple[Tensor, Tensor]:
        """Token ids -> image [3, H, W] float32 in [-1, 1] and mask [H, W] float32 (1 where a token stands).

        Pixels without a token are 0, the middle grey. Raises ValueError for ids outside the vocabulary or more ids
        than the image holds.
        """
        tokens = torch.from_numpy(np.array(ids, dtype=np.int64)).reshape(-1)  # a copy: any strides, read-only memory
        self._check_ids(tokens)
        order = pixel_order(img_size, self.token_size, layout, patch_size)
        if len(tokens) > len(order):
            raise ValueError(f"{len(tokens)} tokens do not fit into an image of {len(order)} cells")
        where = order[: len(tokens)].reshape(-1)  # [n * token_size^2]
        image, mask = torch.zeros(3, img_size * img_size), torch.zeros(img_size * img_size)
        image[:, where] = self.codebook[tokens].view(-1, 3).T
        mask[where] = 1.0
        return image.view(3, img_size, img_size), mask.view(img_size, img_size)

    def decode(
        self, image: Tensor, mask: Tensor | None = None, layout: str = "patch", patch_size: int = 4
    ) -> list[Any]:
        """Image [3, H, W] -> list of int, or a batch [B, 3, H, W] -> one list per image.

        The nearest level of every channel is taken. With a mask ([H, W] or [B, H, W]) only cells whose pixels are all
        valid are read. Colours that are no token become the nearest valid id; `decode_tensor` counts them.
        """
        batch = image if image.dim() == 4 else image[None]
        ids, _ = self.decode_tensor(batch, layout, patch_size)
        if mask is None:
            rows = ids.tolist()
        else:
            order = pixel_order(batch.shape[-1], self.token_size, layout, patch_size).to(batch.device)
            valid = (mask.reshape(len(batch), -1) > 0)[:, order].all(-1)  # [B, capacity]
            rows = [row[keep].tolist() for row, keep in zip(ids, valid, strict=True)]
        return rows if image.dim() == 4 else rows[0]

    def decode_tensor(self, image: Tensor, layout: str = "patch", patch_size: int = 4) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> ids int64 [B, capacity] and invalid bool [B, capacity] (colours that are no token).

        Raises ValueError for images that are not square.
        """
        if image.shape[-1] != image.shape[-2]:
            raise ValueError(f"token images are square, not {tuple(image.shape[-2:])}")
        order = pixel_order(image.shape[-1], self.token_size, layout, patch_size).to(image.device)
        values = image.flatten(2)[:, :, order]  # [B, 3, capacity, token_size^2]
        return self.nearest(values.permute(0, 2, 3, 1).flatten(2))

    def nearest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Channel values [..., D] -> nearest ids int64 [...] and invalid bool [...] (a colour of no token, or NaN)."""
        places = ((values.float() + 1) * (0.5 * (self.radix - 1))).round().clamp(0, self.radix - 1)
        codes = (places.nan_to_num().long() * self._powers.to(values.device)).sum(-1)
        invalid = (codes >= self.vocab_size) | places.isnan().any(-1)
        codes = codes.clamp(max=self.vocab_size - 1)
        return (codes if self._id_of_code is None else self._id_of_code.to(codes.device)[codes]), invalid

    def _check_ids(self, ids: Tensor) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0].item()
            raise ValueError(f"token id {bad} is outside the vocabulary 0 … {self.vocab_size - 1}")

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        """Everything that defines the codec, as JSON-ready values; `from_dict` is the inverse."""
        palette = None if self.palette is None else self.palette.tolist()
        return {
            "vocab_size": self.vocab_size,
            "token_size": self.token_size,
            "radix": self.radix,
            "palette": palette,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenCodec:
        """The codec that `to_dict` described. Raises ValueError for unknown or missing keys and bad values."""
        fields = {"vocab_size": int, "token_size": int, "radix": int, "palette": list[int] | None}
        problems = value_problems(values, fields, "codec.")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(**values)

    def save_png(
        self, path: str | Path, ids: Sequence[int], img_size: int = 64, layout: str = "patch", patch_size: int = 4
    ) -> None:
        """Writes the image of the ids. Lossless: `load_png` gives the ids back. The file notes the code it uses."""
        from PIL import Image, PngImagePlugin

        image, _ = self.encode(ids, img_size, layout, patch_size)
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        note = self._note() | {"layout": layout, "patch_size": patch_size, "num_tokens": len(ids)}
        info = PngImagePlugin.PngInfo()
        info.add_text("ds_tokimg", json.dumps(note))
        Image.fromarray(pixels, "RGB").save(Path(path), format="PNG", pnginfo=info)

    def load_png(self, path: str | Path, layout: str = "patch", patch_size: int = 4) -> list[int]:
        """Ids of an image file. A file that `save_png` wrote knows its layout and length; another file is read whole.

        Raises ValueError when the file was written with another code.
        """
        from PIL import Image

        with Image.open(path) as file:
            note = json.loads(file.info.get("ds_tokimg", "{}"))
            pixels = np.asarray(file.convert("RGB"), dtype=np.float32)
        for name, own in self._note().items():
            if note.get(name, own) != own:
                raise ValueError(f"{path} was written with {name}={note[name]}, this codec has {own}")
        image = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
        ids = self.decode(image, None, note.get("layout", layout), note.get("patch_size", patch_size))
        return ids[: note.get("num_tokens", len(ids))]

    def _note(self) -> dict[str, Any]:
        """What an image file says about the code it was written with: `to_dict` with a checksum of the palette."""
        palette = None if self.palette is None else zlib.crc32(self.palette.numpy().tobytes())
        return self.to_dict() | {"palette": palette}


def _smallest_radix(vocab_size: int, digits: int) -> int:
    radix = max(2, int(vocab_size ** (1 / digits)))
    while radix**digits < vocab_size:
        radix += 1
    while radix > 2 and (radix - 1) ** digits >= vocab_size:
        radix -= 1
    return radix


def _as_permutation(palette: ArrayLike | Tensor | None, vocab_size: int) -> Tensor | None:
    if palette is None:
        return None
    if not isinstance(palette, torch.Tensor):
        try:
            palette = torch.from_numpy(np.array(palette, dtype=np.int64))
        except OverflowError:
            raise ValueError(f"palette must be a permutation of range({vocab_size})") from None
    if palette.shape != (vocab_size,) or not torch.equal(palette.sort().values, torch.arange(vocab_size)):
        raise ValueError(f"palette must be a permutation of range({vocab_size})")
    return palette
