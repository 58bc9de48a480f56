"""Token images for people: cropped to their text, enlarged, with their words; and text as it comes out of noise.

One function draws them all (`draw`); PNG files, TensorBoard, the README and the animation of `generate` show what it
draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ds_tokimg.tokens.codec import pixel_order
from ds_tokimg.tokens.layout import PatchLayout

WIDTH = 960  # of a picture, in pixels
MARGIN, LINE, FONT_SIZE = 12, 24, 16
PAPER, INK = (255, 255, 255), (24, 24, 27)
# Words are as dark as they are certain, from this grey on.
FAINTEST = 0.12
MILLISECONDS, LAST_MILLISECONDS = 250, 4000  # that a frame of an animation stays


@dataclass(frozen=True)
class Frame:
    """A token image on its way from noise to text.

    image: [3, H, W], clean values in [-1, 1] (noisy ones may lie outside: they are cut off).
    ids: the tokens that are read there. certainty: of each, in [0, 1]; empty: all are certain.
    title: a line above it, such as the noise level.
    """

    image: Tensor
    ids: list[int]
    certainty: list[float] = field(default_factory=list)
    title: str = ""


def draw(frame: Frame, layout: PatchLayout, tokenizer, width: int = WIDTH) -> Image.Image:
    """A picture of `width` pixels: the title, the part of the image that holds the tokens (each pixel a square), and
    the tokens' words, each underlined in its own colour.
    """
    cut = cropped(frame.image, layout, len(frame.ids))
    inner = width - 2 * MARGIN
    scale = max(1, inner // cut.shape[2])
    # Short texts make narrow images; squares of more than a line's height would hide the words.
    scale = min(scale, max(1, 3 * LINE // layout.codec.token_size))
    pixels = _pixels(cut).resize((cut.shape[2] * scale, cut.shape[1] * scale), Image.Resampling.NEAREST)
    placed = place_words(words(tokenizer, frame.ids), inner)
    rows = 1 + max((row for row, *_ in placed), default=0)
    title = LINE if frame.title else 0
    picture = Image.new("RGB", (width, title + pixels.height + rows * LINE + 3 * MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN // 2), frame.title, INK, font())
    picture.paste(pixels, (MARGIN, title + MARGIN))
    top = title + pixels.height + 2 * MARGIN
    for (row, left, text), token, certainty in zip(placed, frame.ids, _certainties(frame), strict=True):
        _write(pen, (MARGIN + left, top + row * LINE), text, _colour(layout, token), certainty)
    return picture


def strip(frames: list[Frame], layout: PatchLayout, tokenizer, width: int = WIDTH) -> Image.Image:
    """Frames one below the other."""
    return _below([draw(frame, layout, tokenizer, width) for frame in frames])


def grid(rows: list[list[Frame]], layout: PatchLayout, tokenizer, width: int = WIDTH) -> Image.Image:
    """Rows of frames, those of a row side by side, one row below the other; `width` is the whole picture's."""
    pictures = []
    for row in rows:
        parts = [draw(frame, layout, tokenizer, width // len(row)) for frame in row]
        picture = Image.new("RGB", (width, max(part.height for part in parts)), PAPER)
        for place, part in enumerate(parts):
            picture.paste(part, (place * (width // len(row)), 0))
        pictures.append(picture)
    return _below(pictures)


def _below(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one width, one below the other."""
    whole = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def save_animation(frames: list[Frame], path: str | Path, layout: PatchLayout, tokenizer, width: int = WIDTH) -> None:
    """Frames one after another, for ever, as a GIF; the last one stays for a while.

    Raises OSError when the file cannot be written.
    """
    drawn = [draw(frame, layout, tokenizer, width) for frame in frames]
    pictures = [Image.new("RGB", (width, max(picture.height for picture in drawn)), PAPER) for _ in drawn]
    for picture, part in zip(pictures, drawn, strict=True):
        picture.paste(part, (0, 0))
    durations = [MILLISECONDS] * (len(pictures) - 1) + [LAST_MILLISECONDS]
    first, *rest = [picture.quantize(128) for picture in pictures]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def cropped(image: Tensor, layout: PatchLayout, count: int) -> Tensor:
    """The smallest part [3, h, w] of an image [3, H, W] that holds its first `count` tokens (at least one)."""
    order = pixel_order(layout.img_size, layout.codec.token_size, layout.layout, layout.patch_size)
    places = order[: max(1, count)].flatten()
    rows, columns = places // layout.img_size, places % layout.img_size
    return image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def words(tokenizer, ids: list[int]) -> list[str]:
    """The piece of text that each token adds; bytes that are no whole character yet belong to the token after them."""
    pieces, begin = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[begin:end])
        if text.endswith("\ufffd") and end < len(ids) and end - begin < 4:
            pieces.append("")
            continue
        pieces.append(text)
        begin = end
    return pieces


def place_words(pieces: list[str], width: int) -> list[tuple[int, int, str]]:
    """(row, left edge in pixels, text) of each piece, in rows of at most `width` pixels; line breaks begin a row."""
    placed, row, left = [], 0, 0
    for piece in pieces:
        text = piece.replace("\t", "    ")
        if "\n" in text:
            row, left, text = row + 1, 0, text.replace("\n", "")
        length = round(font().getlength(text))
        if left and left + length > width:
            row, left, text = row + 1, 0, text.lstrip(" ")
            length = round(font().getlength(text))
        placed.append((row, left, text))
        left += length
    return placed


@lru_cache(maxsize=1)
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, so that pictures are alike on every machine."""
    return ImageFont.load_default(FONT_SIZE)


def _certainties(frame: Frame) -> list[float]:
    return frame.certainty or [1.0] * len(frame.ids)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: tuple[int, ...], certainty: float):
    left, top = place
    strength = FAINTEST + (1 - FAINTEST) * certainty
    ink = tuple(round(paper + (own - paper) * strength) for paper, own in zip(PAPER, INK, strict=True))
    pen.text((left, top), text, ink, font())
    right = left + round(font().getlength(text))
    if right > left:
        pen.rectangle((left, top + LINE - 5, right - 1, top + LINE - 3), fill=colour)


def _colour(layout: PatchLayout, token: int) -> tuple[int, ...]:
    """Of a token's first pixel, 0 to 255."""
    return tuple(((layout.codec.codebook[token, :3] + 1) * 127.5).round().int().tolist())


def _pixels(image: Tensor) -> Image.Image:
    """[3, h, w] in [-1, 1] -> RGB."""
    values = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()), "RGB")
