import json

import numpy as np
import pytest
import torch
from PIL import Image

from ds_tokimg.tokens.codec import TokenCodec, check_geometry, pixel_order, token_of_slot

# (vocabulary, token_size, radix): balanced codes of all sizes, analog bits, and the reference system's base 256.
CODES = [
    (2, 1, None),
    (256, 1, None),
    (4096, 1, None),
    (151_643, 1, None),
    (256_000, 1, None),
    (256_000, 2, None),
    (256_000, 4, None),
    (151_643, 1, 256),
    (4096, 2, 2),
    (16_777, 1, 255),
]


def defined_image(codec, ids, img_size, layout, patch_size):
    """The image by the definition, token by token and pixel by pixel."""
    size = codec.token_size
    image, mask = np.zeros((3, img_size, img_size), np.float32), np.zeros((img_size, img_size), np.float32)
    for place, token in enumerate(ids):
        if layout == "raster":
            row, column = divmod(place, img_size // size)
        else:
            cells = patch_size // size
            patch, inside = divmod(place, cells**2)
            patch_row, patch_column = divmod(patch, img_size // patch_size)
            cell_row, cell_column = divmod(inside, cells)
            row, column = patch_row * cells + cell_row, patch_column * cells + cell_column
        rest = int(codec.palette[token]) if codec.palette is not None else int(token)
        for pixel in range(size**2):
            y, x = row * size + pixel // size, column * size + pixel % size
            mask[y, x] = 1.0
            for channel in range(3):
                rest, digit = divmod(rest, codec.radix)
                image[channel, y, x] = 2 * digit / (codec.radix - 1) - 1
    return image, mask


@pytest.mark.parametrize(
    ("token_size", "vocab_size", "radix"),
    [
        (1, 4096, 16), (1, 151_643, 54), (1, 256_000, 64),
        (2, 4096, 2), (2, 151_643, 3), (2, 256_000, 3),
        (4, 4096, 2), (4, 151_643, 2), (4, 256_000, 2),
    ],
)  # fmt: skip
def test_radix_of_the_usual_vocabularies(token_size, vocab_size, radix):
    codec = TokenCodec(vocab_size, token_size)
    assert (codec.radix, codec.digits_per_token) == (radix, 3 * token_size**2)
    assert codec.capacity(64) == (64 // token_size) ** 2


def test_radix_is_the_smallest_that_fits():
    cubes = [radix**3 + off for radix in range(2, 64) for off in (-1, 0, 1)]
    for vocab_size in [1, 2, 3, *cubes]:
        radix = next(r for r in range(2, 300) if r**3 >= vocab_size)
        assert TokenCodec(vocab_size).radix == radix, vocab_size


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize(("token_size", "patch_size"), [(1, 4), (2, 4), (4, 4), (2, 8), (1, 2)])
def test_image_is_as_defined(layout, token_size, patch_size):
    rng = np.random.default_rng(0)
    codec = TokenCodec(700, token_size, palette=rng.permutation(700))
    for length in (0, 1, codec.capacity(16)):
        ids = rng.integers(0, 700, length)
        image, mask = codec.encode(ids, 16, layout, patch_size)
        expected_image, expected_mask = defined_image(codec, ids, 16, layout, patch_size)
        assert image.shape == (3, 16, 16) and mask.shape == (16, 16)
        torch.testing.assert_close(image, torch.from_numpy(expected_image), atol=1e-6, rtol=0)
        assert torch.equal(mask, torch.from_numpy(expected_mask))


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize(("vocab_size", "token_size", "radix"), CODES)
def test_every_id_round_trips(vocab_size, token_size, radix, layout):
    codec = TokenCodec(vocab_size, token_size, radix)
    capacity = codec.capacity(64)
    for start in range(0, vocab_size, capacity):
        ids = np.arange(start, min(vocab_size, start + capacity))
        image, mask = codec.encode(ids, 64, layout)
        assert image.abs().max() <= 1
        assert codec.decode(image, mask, layout) == ids.tolist()


@pytest.mark.parametrize(("vocab_size", "token_size", "radix"), CODES)
def test_any_error_below_half_a_level_is_corrected(vocab_size, token_size, radix):
    codec = TokenCodec(vocab_size, token_size, radix, palette=np.random.default_rng(0).permutation(vocab_size))
    ids = torch.arange(vocab_size)
    colours = codec.codebook  # [V, D]
    half_level = 1 / (codec.radix - 1)
    share = 1.98 * torch.rand(colours.shape, generator=torch.Generator().manual_seed(1)) - 0.99
    for error in (share, 0.99 * share.sign()):
        decoded, invalid = codec.nearest(colours + half_level * error)
        assert torch.equal(decoded, ids) and not invalid.any()


def test_error_above_half_a_level_is_another_token():
    codec = TokenCodec(64)
    moved = codec.codebook.clone()
    moved[:, 0] += torch.where(codec.digit_table[:, 0] == 3, -1.02, 1.02) / (codec.radix - 1)
    assert (codec.nearest(moved)[0] != torch.arange(64)).all()


def test_palette_permutes_colours_only():
    permutation = np.random.default_rng(0).permutation(500)
    plain, permuted = TokenCodec(500), TokenCodec(500, palette=permutation)
    assert torch.equal(permuted.codebook, plain.codebook[torch.from_numpy(permutation)])
    image, mask = permuted.encode(range(500), 64)
    assert permuted.decode(image, mask) == list(range(500))
    assert plain.decode(image, mask) == permutation.tolist()


def test_colours_that_are_no_token_are_counted_and_become_the_nearest_id():
    codec = TokenCodec(10)  # radix 3: 27 colours, 17 of them no token
    colours = torch.cartesian_prod(codec.levels, codec.levels, codec.levels).flip(-1)  # code 0, 1, 2, … 26
    ids, invalid = codec.nearest(colours)
    assert ids.tolist() == [*range(10), *[9] * 17]
    assert invalid.tolist() == [False] * 10 + [True] * 17
    image = colours[10].view(3, 1, 1).expand(3, 4, 4)[None]
    ids, invalid = codec.decode_tensor(image)
    assert invalid.all() and (ids == 9).all()


def test_values_outside_the_range_and_nan():
    codec = TokenCodec(27)
    assert codec.nearest(torch.tensor([[-9.0, -1.3, 7.0]]))[0].item() == 2 * 9
    ids, invalid = codec.nearest(torch.tensor([[0.0, float("nan"), 0.0], [1.0, 1.0, 1.0]]))
    assert invalid.tolist() == [True, False] and 0 <= ids[0] < 27


@pytest.mark.parametrize("layout", ["patch", "raster"])
def test_decode_of_a_batch_follows_each_mask(layout):
    codec = TokenCodec(300, token_size=2)
    texts = [[], [1], list(range(100, 117)), list(range(64))]
    images, masks = zip(*(codec.encode(text, 16, layout) for text in texts), strict=True)
    assert codec.decode(torch.stack(images), torch.stack(masks), layout) == texts
    for row, text in zip(codec.decode(torch.stack(images), None, layout), texts, strict=True):
        assert row[: len(text)] == text
    ids = codec.decode(images[3], None, layout)
    assert ids == texts[3] and all(type(i) is int for i in ids)


@pytest.mark.parametrize(("token_size", "patch_size"), [(1, 4), (2, 4), (4, 4), (2, 8)])
def test_patch_layout_fills_the_first_patches(token_size, patch_size):
    codec = TokenCodec(100, token_size)
    for length in range(codec.capacity(16) + 1):
        _, mask = codec.encode(np.zeros(length, int), 16, "patch", patch_size)
        patches = mask.unfold(0, patch_size, patch_size).unfold(1, patch_size, patch_size).amax((2, 3)).flatten()
        used = -(-length * token_size**2 // patch_size**2)
        assert patches.tolist() == [1.0] * used + [0.0] * (len(patches) - used)


@pytest.mark.parametrize("layout", ["patch", "raster"])
def test_orders_are_permutations(layout):
    for token_size, patch_size in [(1, 2), (1, 8), (2, 4), (4, 8)]:
        order = pixel_order(16, token_size, layout, patch_size)
        assert sorted(order.flatten().tolist()) == list(range(256))
        slots = token_of_slot(16, token_size, layout, patch_size)
        assert slots.shape == ((16 // patch_size) ** 2, (patch_size // token_size) ** 2)
        assert sorted(slots.flatten().tolist()) == list(range(256 // token_size**2))
        if layout == "patch":
            assert torch.equal(slots.flatten(), torch.arange(slots.numel()))


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize(("vocab_size", "token_size", "radix"), CODES)
def test_png_round_trip(tmp_path, vocab_size, token_size, radix, layout):
    codec = TokenCodec(vocab_size, token_size, radix)
    # The ids with the extreme codes, and some between: every level occurs.
    ids = np.unique(np.linspace(0, vocab_size - 1, min(200, codec.capacity(64))).astype(int)).tolist()
    path = tmp_path / "text.png"
    codec.save_png(path, ids, 64, layout)
    with Image.open(path) as file:
        assert (file.mode, file.size) == ("RGB", (64, 64))
    assert codec.load_png(path) == ids
    with Image.open(path) as file:  # as another program would save it: without our note
        Image.fromarray(np.asarray(file)).save(tmp_path / "bare.png")
    with Image.open(tmp_path / "bare.png") as file:
        assert "ds_tokimg" not in file.info
    whole = codec.load_png(tmp_path / "bare.png", layout)
    assert len(whole) == codec.capacity(64) and whole[: len(ids)] == ids


def test_every_level_of_every_radix_survives_eight_bits():
    for radix in range(2, 257):
        codec = TokenCodec(radix, radix=radix)
        pixels = ((codec.levels + 1) * 127.5).round()
        values = torch.stack([pixels / 127.5 - 1, *[torch.full((radix,), -1.0)] * 2], -1)
        assert codec.nearest(values)[0].tolist() == list(range(radix))


def test_png_of_another_code_is_refused(tmp_path):
    path = tmp_path / "text.png"
    TokenCodec(500).save_png(path, [1, 2, 3])
    for other, name in [
        (TokenCodec(501), "vocab_size=500"),
        (TokenCodec(500, 2), "token_size=1"),
        (TokenCodec(500, radix=9), "radix=8"),
        (TokenCodec(500, palette=np.arange(500)[::-1]), "palette=None"),
    ]:
        with pytest.raises(ValueError, match=name):
            other.load_png(path)


def test_description_round_trips_as_json():
    for codec in (TokenCodec(300, 2), TokenCodec(300, 1, 9, np.random.default_rng(0).permutation(300))):
        again = TokenCodec.from_dict(json.loads(json.dumps(codec.to_dict())))
        assert again.to_dict() == codec.to_dict()
        assert torch.equal(again.codebook, codec.codebook)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 10, "token_size": 0}, "token_size"),
        ({"vocab_size": 1000, "radix": 9}, "at least 10"),
        ({"vocab_size": 10, "radix": 1}, "between 2 and 256"),
        ({"vocab_size": 10, "radix": 257}, "between 2 and 256"),
        ({"vocab_size": 2**25}, "between 2 and 256"),
        ({"vocab_size": 3, "palette": [0, 1]}, "permutation"),
        ({"vocab_size": 3, "palette": [0, 1, 1]}, "permutation"),
    ],
)
def test_wrong_codes(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenCodec(**arguments)


def test_wrong_texts_and_images():
    codec = TokenCodec(100)
    for ids in ([100], [-1], [0, 1, 100]):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            codec.encode(ids)
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        codec.encode([0] * 17, img_size=4)
    with pytest.raises(ValueError, match="square"):
        codec.decode(torch.zeros(3, 8, 16))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ((64, 1, "spiral", 4), "unknown layout 'spiral'; available: patch, raster"),
        ((64, 3, "patch", 4), "multiple of token_size"),
        ((30, 1, "patch", 4), "multiple of patch_size"),
        ((64, 1, "patch", 0), "at least 1"),
    ],
)
def test_wrong_geometry(geometry, message):
    with pytest.raises(ValueError, match=message):
        check_geometry(*geometry)
