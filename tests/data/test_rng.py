import numpy as np
import pytest

from ds_tokimg.data.rng import Stream, generator, low_discrepancy

WORD = (1 << 64) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64 with ten rounds, after the paper (Salmon et al. 2011, section 4.3)."""
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & WORD,
            (first >> 64) ^ counter[3] ^ key[1],
            first & WORD,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & WORD, (key[1] + 0xBB67AE8584CAA73B) & WORD]
    return counter


@pytest.mark.parametrize(
    ("seed", "stream", "epoch", "index"),
    [(0, Stream.NOISE, 0, 0), (1234, Stream.GENERATION, 7, 10**12), (-1, Stream.TIMESTEP, 3, 5)],
)
def test_draws_are_those_of_philox(seed, stream, epoch, index):
    raw = generator(seed, stream, epoch, index).bit_generator.random_raw(8).tolist()
    key = [seed & WORD, (int(stream) << 48) | epoch]
    # numpy counts up before each block of four.
    assert raw == philox([1, 0, index, 0], key) + philox([2, 0, index, 0], key)


def test_every_part_of_the_key_counts():
    keys = [(0, Stream.NOISE, 0, 0), (1, Stream.NOISE, 0, 0), (0, Stream.NOISE, 1, 0), (0, Stream.NOISE, 0, 1)]
    keys += [(0, stream, 0, 0) for stream in Stream if stream != Stream.NOISE]
    draws = np.stack([generator(*key).standard_normal(4000) for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(4000)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_longer_draw_begins_with_the_shorter_one(dtype):
    long = generator(3, Stream.NOISE, 1, 2).standard_normal(1000, dtype=dtype)
    for length in (1, 2, 7, 500):
        assert np.array_equal(generator(3, Stream.NOISE, 1, 2).standard_normal(length, dtype=dtype), long[:length])


def test_global_generators_are_left_alone():
    state = np.random.get_state()[1].copy()
    generator(0, Stream.NOISE).standard_normal(10)
    low_discrepancy(0, Stream.TIMESTEP, 0, np.arange(10))
    assert np.array_equal(state, np.random.get_state()[1])


def test_low_discrepancy_does_not_depend_on_how_it_is_asked():
    whole = low_discrepancy(5, Stream.TIMESTEP, 2, np.arange(100))
    assert np.array_equal(whole[[70, 3, 41]], low_discrepancy(5, Stream.TIMESTEP, 2, np.array([70, 3, 41])))
    assert (whole >= 0).all() and (whole < 1).all()
    assert whole[0] != low_discrepancy(5, Stream.TIMESTEP, 3, np.arange(1))[0]
    assert len(low_discrepancy(5, Stream.TIMESTEP, 2, np.zeros(0, int))) == 0


@pytest.mark.parametrize("size", [2, 5, 8, 16, 33, 256])
def test_any_window_covers_the_interval_evenly(size):
    """By the three-gap theorem no gap between `size` consecutive points is larger than golden ratio + 1 over size."""
    for start in (0, 1, 17, 10**6, 10**9):
        points = np.sort(low_discrepancy(1, Stream.TIMESTEP, 0, start + np.arange(size)))
        gaps = np.diff(points, append=points[0] + 1)
        assert gaps.max() < 2.62 / size
        # and every interval holds its share of them
        counts, _ = np.histogram(points, bins=4, range=(0, 1))
        assert np.abs(counts - size / 4).max() <= 1 + np.log2(size) / 3


def test_epochs_move_the_points_evenly():
    first = [low_discrepancy(0, Stream.TIMESTEP, epoch, np.zeros(1))[0] for epoch in range(2000)]
    counts, _ = np.histogram(first, bins=10, range=(0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
