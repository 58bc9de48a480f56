"""Mixtures: the shares of an epoch, and that no image of a source is seen more often than another."""

from collections import Counter

import numpy as np
import pytest

from ds_tokimg.data.order import Mixture, TrainBatchSampler

SOURCE_OF = np.array([0] * 70 + [1] * 10 + [0] * 5 + [2] * 15)


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.2, 0.1], [1, 30, 2.5], [97, 1, 2]])
def test_shares_of_an_epoch(weights):
    mixture = Mixture(SOURCE_OF, weights)
    for epoch in range(4):
        drawn = mixture.draw(5, epoch)
        assert len(drawn) == len(SOURCE_OF)
        counts = np.bincount(SOURCE_OF[drawn % len(SOURCE_OF)], minlength=3)
        assert np.abs(counts - len(SOURCE_OF) * np.array(weights) / sum(weights)).max() <= 1
        assert len(np.unique(drawn)) == len(drawn) and drawn.max() < len(SOURCE_OF) * mixture.most_passes


def test_over_epochs_all_images_of_a_source_are_seen_equally_often():
    mixture = Mixture(SOURCE_OF, [1, 1, 1])
    seen = Counter()
    for epoch in range(7):
        seen.update((mixture.draw(0, epoch) % len(SOURCE_OF)).tolist())
        for source in range(3):
            times = [seen[i] for i in np.flatnonzero(source == SOURCE_OF)]
            assert max(times) - min(times) <= 1, (epoch, source)


def test_an_epoch_depends_on_seed_and_number_alone():
    mixture = Mixture(SOURCE_OF, [1, 2, 1])
    assert np.array_equal(mixture.draw(0, 3), Mixture(SOURCE_OF, [2, 4, 2]).draw(0, 3))
    assert not np.array_equal(mixture.draw(0, 3), mixture.draw(1, 3))
    assert not np.array_equal(mixture.draw(0, 3), mixture.draw(0, 4))


def test_batches_of_a_mixture():
    lengths = np.arange(100, 0, -1)
    mixture = Mixture(SOURCE_OF, [1, 1, 1])
    sampler = TrainBatchSampler(lengths, 8, seed=2, mixture=mixture)
    batches = sampler.batches(1)
    assert len(batches) == sampler.steps_per_epoch == 12
    drawn = set(mixture.draw(2, 1).tolist())
    taken = [sample for batch in batches for sample in batch.tolist()]
    assert len(taken) == len(set(taken)) == 96 and set(taken) <= drawn
    for batch in batches:
        assert (np.diff(lengths[batch % 100]) >= 0).all()
    assert [b.tolist() for b in sampler.batches(1, 5)] == [b.tolist() for b in batches[5:]]
