"""The semantic palette: a permutation, reproducible, with near colours for tokens of one kind."""

import time

import numpy as np
import pytest

from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.palette import semantic_palette


def classes_text(num_classes: int, per_class: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of classes that follow each other in a fixed order of classes: ids [length] and class of each id."""
    rng = np.random.default_rng(seed)
    class_of = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    members = [np.flatnonzero(class_of == c) for c in range(num_classes)]
    follows = np.stack([rng.permutation(num_classes)[:2] for _ in range(num_classes)])
    stream, current = np.empty(length, np.int64), 0
    for i in range(length):
        stream[i] = rng.choice(members[current])
        current = follows[current, rng.integers(2)]
    return stream, class_of


def colour_distance(palette, class_of, codec) -> tuple[float, float]:
    """Mean distance of colours within classes, and between any two tokens."""
    colours = TokenCodec(codec.vocab_size, codec.token_size, codec.radix, palette).codebook.numpy()
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    alike = (class_of[:, None] == class_of[None]) & ~np.eye(len(class_of), dtype=bool)
    return distance[alike].mean(), distance[~np.eye(len(class_of), dtype=bool)].mean()


def test_tokens_of_one_kind_get_near_colours():
    stream, class_of = classes_text(8, 64, 60_000)
    codec = TokenCodec(512)
    learned = colour_distance(semantic_palette([stream], 512, codec.radix), class_of, codec)
    plain = colour_distance(np.arange(512), class_of, codec)
    assert plain[0] > 0.95 * plain[1]
    # Eight classes in eight octants would give one half; a split may cut through a class.
    assert learned[0] < 0.8 * learned[1]


@pytest.mark.parametrize(
    ("vocab_size", "radix", "token_size"),
    [(1, 2, 1), (2, 2, 1), (7, 2, 1), (1000, 10, 1), (1024, 11, 1), (300, 256, 1), (500, 2, 2), (500, 3, 4)],
)
def test_any_cube_gets_a_permutation_that_the_codec_takes(vocab_size, radix, token_size):
    stream = np.random.default_rng(0).integers(0, vocab_size, 5000)
    palette = semantic_palette([stream], vocab_size, radix, token_size)
    assert palette.dtype == np.int64 and np.array_equal(np.sort(palette), np.arange(vocab_size))
    codec = TokenCodec(vocab_size, token_size, radix, palette)
    ids = list(range(min(vocab_size, codec.capacity(64))))
    assert codec.decode(*codec.encode(ids)) == ids


def test_same_tokens_same_palette_however_they_are_cut():
    stream, _ = classes_text(6, 20, 9000)
    whole = semantic_palette([stream], 120, 5)
    pieces = semantic_palette(iter(np.array_split(stream.astype(np.int32), 7)), 120, 5)
    assert np.array_equal(whole, pieces)


@pytest.mark.parametrize("pieces", [[], [np.zeros(0, np.int32)], [np.array([3])], [np.array([3, 3, 3])]])
def test_too_little_text_still_gives_a_permutation(pieces):
    assert np.array_equal(np.sort(semantic_palette(pieces, 30, 4)), np.arange(30))


def test_a_real_vocabulary_takes_seconds():
    rng = np.random.default_rng(0)
    stream = np.minimum(rng.zipf(1.2, 1_000_000), 151_669) - 1
    begun = time.perf_counter()
    palette = semantic_palette([stream], 151_669, 54)
    assert time.perf_counter() - begun < 30
    assert np.array_equal(np.sort(palette), np.arange(151_669))
