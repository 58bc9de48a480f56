import itertools

import numpy as np
import pytest
import torch

from ds_tokimg.data.batch import BatchMaker, BatchPacker, Canvas, Draws
from ds_tokimg.diffusion.path import TimestepSampler
from ds_tokimg.model.config import JiTConfig
from ds_tokimg.model.jit import JiT
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.tokens.layout import PatchLayout
from tests.support.tiny import random_texts

CODEC = TokenCodec(50)
LENGTHS = [256, 100, 33, 32, 7, 1, 16, 60]
PROMPTS = [3, 0, 20, 60, 1, 2, 5, 9]


def maker_of(layout="patch", timesteps="band", seed=0, block_size=0, **draws):
    packer = BatchPacker(PatchLayout(CODEC, 16, 4, layout), block_size)
    return BatchMaker(packer, TimestepSampler(timesteps, 4), seed, Draws(**draws))


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize(("token_size", "patch_size"), [(1, 4), (2, 4), (4, 8), (1, 2)])
def test_packing_is_the_codec_in_patches(token_size, patch_size, layout):
    """Colours of the packed ids, put together as an image, are what the codec encodes."""
    codec = TokenCodec(50, token_size)
    model = JiT(codec, JiTConfig(1, 16, 1, patch_size=patch_size, img_size=16))
    packer = PatchLayout(codec, 16, patch_size, layout)
    capacity = codec.capacity(16)
    texts = random_texts(50, [capacity, capacity // 3 + 1, 1, 0]).texts
    ids, mask = packer.pack(texts)
    images, masks = zip(*(codec.encode(text, 16, layout, patch_size) for text in texts), strict=True)
    values = codec.codebook[ids] * mask[..., None]
    assert torch.equal(model.unpatchify(values.flatten(2)), torch.stack(images))
    assert torch.equal(mask, model.slot_mask(torch.stack(masks), torch.stack(images)))
    assert not ids[~mask].any()


@pytest.mark.parametrize("layout", ["patch", "raster"])
def test_patches_of_every_length(layout):
    model = JiT(CODEC, JiTConfig(1, 16, 1, img_size=16))
    packer = PatchLayout(CODEC, 16, 4, layout)
    for length in range(257):
        _, mask = CODEC.encode(np.zeros(length, int), 16, layout)
        used = model.slot_mask(mask[None], torch.zeros(1, 3, 16, 16))[0].any(-1)
        count = int(used.sum())
        assert packer.num_patches([length]).tolist() == [count] and used[:count].all()
        assert packer.pack([np.zeros(length, int)])[0].shape == (1, max(1, count), 16)


def test_a_text_that_does_not_fit():
    with pytest.raises(ValueError, match="257 tokens does not fit into an image of 256"):
        PatchLayout(CODEC, 16, 4).pack([np.zeros(257, int)])


@pytest.mark.parametrize("layout", ["patch", "raster"])
@pytest.mark.parametrize("patch_noise", [0.0, 0.5])
def test_draws_do_not_depend_on_partition_or_padding(patch_noise, layout):
    texts = random_texts(50, LENGTHS, PROMPTS)
    maker = maker_of(layout, patch_noise=patch_noise, condition_drop=0.5, canvas=Canvas(8, 7), in_turn=0.5)
    indices, positions = np.array([5, 0, 3, 7, 1, 2, 6, 4]), np.arange(40, 48)
    whole = maker(texts, indices, positions, epoch=2)
    for part in ([0], [1, 2], [3, 4, 5, 6, 7], [7, 0]):
        batch = maker(texts, indices[part], positions[part], epoch=2)
        own = batch.mask.any(-1)  # patches behind a text are padding, whatever they hold
        for name in ("ids", "mask", "t", "noise"):
            value, expected = getattr(batch, name), getattr(whole, name)[part]
            if value.dim() > 1:
                value, expected = value[own], expected[:, : value.shape[1]][own]
            assert torch.equal(value, expected), name
        for value, expected in zip(batch.prompt, whole.prompt, strict=True):
            assert torch.equal(value, expected[part][:, : value.shape[1]])
            assert not expected[part][:, value.shape[1] :].any()
        assert torch.equal(batch.in_turn, whole.in_turn[part])


def test_draws_depend_on_seed_epoch_and_sample():
    texts = random_texts(50, [32, 32])
    batches = [
        maker_of(seed=seed)(texts, [index], [index], epoch)
        for seed, epoch, index in itertools.product((0, 1), repeat=3)
    ]
    noises = torch.stack([batch.noise.flatten() for batch in batches])
    correlation = torch.corrcoef(noises) - torch.eye(8)
    assert correlation.abs().max() < 0.5  # 96 values each
    assert len({float(batch.t) for batch in batches}) == 8


def test_noise_is_standard_normal():
    noise = maker_of()(random_texts(50, [256] * 40), range(40), range(40), 0).noise
    assert noise.shape == (40, 16, 48) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.025 and abs(noise.std() - 1) < 0.02
    assert abs((noise**4).mean() - 3) < 0.15


@pytest.mark.parametrize("patch_noise", [0.0, 0.25, 0.5, 1.0])
def test_share_of_samples_with_a_level_per_patch(patch_noise):
    texts = random_texts(50, [64] * 16)
    batch = maker_of(patch_noise=patch_noise)(texts, range(16), range(100, 116), 0)
    t = batch.t
    if not patch_noise:
        assert t.shape == (16,)
        return
    assert t.shape == (16, 4)
    own_levels = (t != t[:, :1]).any(1)
    assert own_levels.sum() == 16 * patch_noise
    if patch_noise == 0.5:  # spread over the batch, so that every micro-batch has its share
        assert own_levels.view(4, 4).sum(1).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("patch_noise", [0.0, 0.5])
def test_timesteps_of_a_train_batch_are_stratified(patch_noise):
    """The samples with one level cover the band evenly in any stretch of the epoch; band is uniform in log-SNR."""
    texts = random_texts(50, [16] * 512)
    maker = maker_of(patch_noise=patch_noise)
    band = maker.timesteps.band
    for start in (0, 37, 448):
        places = np.arange(start, start + 64)
        t = maker(texts, places, places, epoch=1).t.double().view(64, -1)[:, 0]
        if patch_noise:
            t = t[~(np.floor((places + 1) * patch_noise) > np.floor(places * patch_noise))]
        quantile = (2 * torch.log((1000 - t) / t) - band.low) / (band.high - band.low)
        counts = torch.histc(quantile, 8, 0, 1)
        assert (counts - len(t) / 8).abs().max() <= 2


def test_levels_of_patches_are_independent_draws():
    texts = random_texts(50, [256] * 64)
    maker = maker_of(timesteps="uniform", patch_noise=1.0)
    t = maker(texts, range(64), range(64), 0).t
    counts = torch.histc(t, 10, 0, 1000)
    expected = t.numel() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    correlation = torch.corrcoef(t.T) - torch.eye(16)
    assert correlation.abs().max() < 4.5 / 64**0.5


@pytest.mark.parametrize("block_size", [1, 3])
def test_blocks_have_levels_of_their_own_that_cover_the_band(block_size):
    """One level a block, spread evenly within every text and over the texts, whatever their batch."""
    texts = random_texts(50, [256] * 32)
    maker = maker_of(block_size=block_size)
    batch = maker(texts, range(32), range(32), 0)
    blocks = np.arange(16) // block_size
    assert batch.blocks.tolist() == blocks.tolist()
    t = batch.t.double()
    for block in range(blocks[-1] + 1):
        assert (t[:, blocks == block] == t[:, blocks == block][:, :1]).all()
    band = maker.timesteps.band
    quantile = ((2 * torch.log((1000 - t) / t) - band.low) / (band.high - band.low))[:, ::block_size]
    for part in (quantile[0], quantile[:, 0], quantile):
        counts = torch.histc(part.flatten(), 4, 0, 1)
        assert (counts - part.numel() / 4).abs().max() <= 2
    assert torch.equal(maker(texts, [7], [7], 0).t, batch.t[7:8])
    mixed = maker_of(block_size=3, patch_noise=0.5)(texts, range(32), range(32), 0).t
    assert [bool((row[0] == row[1]).item()) for row in mixed] == [True, False] * 16


def test_conditions_are_dropped_at_the_rate_asked_for():
    texts = random_texts(50, [5] * 600, [4] * 600)
    batch = maker_of(condition_drop=0.1)(texts, range(600), range(600), 0)
    shown = batch.prompt.mask.any((1, 2))
    assert 30 < 600 - shown.sum() < 95  # 60 +- 4.5 deviations
    assert (batch.prompt.mask.sum((1, 2))[shown] == 4).all()
    first = int(shown.nonzero()[0])
    assert torch.equal(batch.prompt.ids[first][batch.prompt.mask[first]], torch.from_numpy(texts.prompts[first]))
    assert maker_of()(texts, [0], [0], 0).prompt is None
    always = maker_of(condition_drop=1.0)(texts, [0, 1], [0, 1], 0)
    assert always.prompt.mask.shape == (2, 1, 16) and not always.prompt.mask.any()


def test_canvas_fills_answers_with_the_end_token():
    texts = random_texts(7, [5, 40, 20], [3, 3, 0])  # ids below 7; the third has no prompt
    maker, lengths = maker_of(condition_drop=0.0, canvas=Canvas(6, 9)), {0: [], 1: [], 2: []}
    for epoch in range(200):
        batch = maker(texts, [0, 1, 2], [0, 1, 2], epoch)
        for row, text in enumerate(texts.texts):
            ids = batch.ids[row][batch.mask[row]].numpy()
            assert np.array_equal(ids[: len(text)], text) and (ids[len(text) :] == 9).all()
            lengths[row].append(len(ids))
    assert set(lengths[2]) == {20}  # not an answer
    for row, own in ((0, 1), (1, 3)):
        patches = np.array(lengths[row]) / 16
        assert set(patches) == set(range(own, 7))
        # half of the time its own patches, else any number up to the canvas
        assert 0.4 < (patches == own).mean() - 0.5 / (7 - own) < 0.6
    assert Canvas(6, 9).fill(np.array([1, 2]), 4).tolist() == [1, 2, 9, 9]
    assert Canvas(6, 9).fill(np.array([1, 2]), 1).tolist() == [1, 2]


@pytest.mark.parametrize("patch_noise", [0.0, 0.5])
def test_an_empty_micro_batch_is_one_row_of_padding(patch_noise):
    texts = random_texts(50, [5], [3])
    maker = maker_of(patch_noise=patch_noise, condition_drop=0.1)
    batch = maker(texts, [], [], 0)
    assert [len(part) for part in (batch.ids, batch.mask, batch.t, batch.noise, *batch.prompt)] == [1] * 6
    assert not batch.mask.any() and not batch.prompt.mask.any()
    assert maker.timesteps.band.holds(2 * torch.log((1000 - batch.t) / batch.t)).all()
