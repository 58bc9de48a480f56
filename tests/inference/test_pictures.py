"""Pictures of token images: what is shown of them, where the words stand, and files that open."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ds_tokimg.inference.pictures import MARGIN, Frame, cropped, draw, font, place_words, save_animation, strip, words
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.layout import PatchLayout
from ds_tokimg.tokens.tokenizer import train_tokenizer

TEXT = "The sea was grey. “Rain,” he said.\nÄ 鳥 flew."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, "the sea and the rain, he said, were grey"] * 20, 280)


@pytest.fixture(scope="module")
def layout(tokenizer):
    return PatchLayout(TokenCodec(len(tokenizer)), 16, 4)


def frame_of(layout, ids, **options) -> Frame:
    image, _ = layout.codec.encode(ids, layout.img_size, layout.layout, layout.patch_size)
    return Frame(image, ids, **options)


@pytest.mark.parametrize("kind", ["patch", "raster"])
@pytest.mark.parametrize("count", [1, 5, 16, 17, 64, 256])
def test_the_part_that_is_shown_holds_all_tokens_and_no_empty_row(layout, kind, count):
    layout = PatchLayout(layout.codec, 16, 4, kind)
    _, mask = layout.codec.encode([1] * count, 16, kind, 4)
    shown = cropped(mask[None].expand(3, -1, -1), layout, count)
    assert shown[0].sum() == mask.sum()
    assert shown[0].any(0).all() and shown[0].any(1).all()


def test_words_put_together_are_the_text(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    pieces = words(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == TEXT


def test_rows_are_no_wider_than_there_is_room():
    pieces = ["word" + " " * (i % 2) for i in range(40)] + ["\n", "after"]
    placed = place_words(pieces, 200)
    assert [text for *_, text in placed][-1] == "after" and placed[-1][:2] == (placed[-3][0] + 1, 0)
    for row, left, text in placed:
        assert left + font().getlength(text) <= 201, row


def test_a_pixel_of_the_image_is_a_square_of_the_picture(layout, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    picture = np.asarray(draw(frame_of(layout, ids), layout, tokenizer, width=240))
    first = ((layout.codec.codebook[ids[0]] + 1) * 127.5).round().int().tolist()
    assert picture[MARGIN, MARGIN].tolist() == picture[MARGIN + 8, MARGIN + 8].tolist() == first


def test_uncertain_words_are_fainter(layout, tokenizer):
    ids = tokenizer("grey sea")["input_ids"]
    pictures = [
        np.asarray(draw(frame_of(layout, ids, certainty=[value] * len(ids)), layout, tokenizer, width=240).convert("L"))
        for value in (0.0, 1.0)
    ]
    below = MARGIN * 2 + 13 * 4  # under the enlarged image
    assert pictures[0][below:].mean() > pictures[1][below:].mean()


def test_a_strip_and_an_animation_of_all_frames(layout, tokenizer, tmp_path):
    ids = tokenizer(TEXT)["input_ids"]
    frames = [frame_of(layout, ids[:n], title=f"{n} tokens") for n in (1, len(ids) // 2, len(ids))]
    whole = strip(frames, layout, tokenizer, width=240)
    assert whole.height == sum(draw(frame, layout, tokenizer, 240).height for frame in frames)
    save_animation(frames, tmp_path / "text.gif", layout, tokenizer, width=240)
    with Image.open(tmp_path / "text.gif") as file:
        sizes = [page.size for page in ImageSequence.Iterator(file)]
        assert len(sizes) == 3 and len(set(sizes)) == 1
