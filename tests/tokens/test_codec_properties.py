"""The codec and the packing of patches on random vocabularies, geometries and texts."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_tokimg.data.order import partition
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.layout import PatchLayout

BOUNDED = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def codecs(draw) -> TokenCodec:
    vocabulary = draw(st.integers(1, 3000) | st.sampled_from([65_536, 151_669]))
    token_size = draw(st.sampled_from([1, 2, 4]))
    radix = draw(st.none() | st.integers(54 if token_size == 1 else 3, 256))
    palette = np.random.default_rng(vocabulary).permutation(vocabulary) if draw(st.booleans()) else None
    return TokenCodec(vocabulary, token_size, radix, palette)


@BOUNDED
@given(st.data(), codecs(), st.sampled_from(["patch", "raster"]))
def test_every_text_is_read_back_from_its_image(data, codec, layout):
    patch = codec.token_size * data.draw(st.sampled_from([1, 2]), "cells a patch")
    size = patch * data.draw(st.integers(1, 4), "patches a side")
    ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=codec.capacity(size)), "ids")
    image, mask = codec.encode(ids, size, layout, patch)
    assert image.shape == (3, size, size) and float(mask.sum()) == len(ids) * codec.token_size**2
    assert codec.decode(image, mask, layout, patch) == ids
    # Anything below half of a level is forgiven, on every pixel at once.
    seed = data.draw(st.integers(0, 99), "seed")
    spread = 0.98 / (codec.radix - 1)
    noise = (2 * torch.rand(image.shape, generator=torch.Generator().manual_seed(seed)) - 1) * spread
    assert codec.decode(image + noise, mask, layout, patch) == ids


@BOUNDED
@given(st.data(), st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 4)]))
def test_packed_patches_hold_each_text_and_nothing_else(data, sizes):
    token_size, patch = sizes
    layout = PatchLayout(TokenCodec(300, token_size), 16, patch, "patch")
    most = layout.codec.capacity(16)
    lengths = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=5), "lengths")
    texts = [np.random.default_rng(row).integers(0, 300, length) for row, length in enumerate(lengths)]
    ids, mask = layout.pack(texts)
    assert ids.shape == mask.shape and ids.shape[1] == max(1, *layout.num_patches(lengths), 0)
    for row, text in enumerate(texts):
        assert ids[row][mask[row]].tolist() == text.tolist()
        assert not mask[row].flatten()[len(text) :].any()


@BOUNDED
@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 6))
def test_every_sample_of_a_train_batch_is_computed_once(samples, ranks, accumulation):
    parts = [part for rank in range(ranks) for part in partition(samples, ranks, accumulation, rank)]
    seen = [sample for part in parts for sample in range(samples)[part]]
    assert sorted(seen) == list(range(samples))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
