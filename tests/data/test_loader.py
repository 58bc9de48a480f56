"""Train batches: the same for every topology, restart and number of threads; little padding; errors that surface."""

import threading
import time

import numpy as np
import pytest
import torch

from ds_tokimg.data.loader import BatchLoader, Part
from ds_tokimg.data.order import TrainBatchSampler, partition, steps_per_epoch

LENGTHS = np.random.default_rng(0).geometric(0.005, 1003).astype(np.int32)


def collate(dataset, indices, positions, epoch):
    return {"indices": torch.as_tensor(indices), "positions": torch.as_tensor(positions), "epoch": torch.tensor(epoch)}


def loader(batch_size=16, lengths=LENGTHS, collate=collate, **options) -> BatchLoader:
    return BatchLoader(None, TrainBatchSampler(lengths, batch_size, seed=1), collate, **options)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bucket", [True, False])
def test_an_epoch_visits_samples_at_most_once_in_full_batches(bucket):
    batches = TrainBatchSampler(LENGTHS, 16, seed=1, bucket=bucket).batches(0)
    assert len(batches) == steps_per_epoch(1003, 16) == 62
    assert all(len(batch) == 16 for batch in batches)
    assert len(np.unique(np.concatenate(batches))) == 62 * 16
    assert all((np.diff(LENGTHS[batch]) >= 0).all() for batch in batches)


def test_epochs_differ_and_chance_decides_what_is_left_out():
    sampler = TrainBatchSampler(LENGTHS, 16, seed=1)
    seen = [set(np.concatenate(sampler.batches(epoch)).tolist()) for epoch in range(20)]
    assert not same(sampler.batches(0), sampler.batches(1))
    assert set.union(*seen) == set(range(1003)) and set.intersection(*seen) != seen[0]


def test_order_depends_on_seed_epoch_and_size_only():
    first, again, other = (TrainBatchSampler(LENGTHS, 16, seed) for seed in (1, 1, 2))
    assert same(first.batches(3), again.batches(3))
    assert not same(first.batches(3), other.batches(3))


def test_start_skips_batches():
    sampler = TrainBatchSampler(LENGTHS, 16, seed=1)
    assert same(sampler.batches(2, start=40), sampler.batches(2)[40:])
    assert sampler.batches(2, start=62) == []


def test_fewer_samples_than_a_batch_make_one_short_batch():
    sampler = TrainBatchSampler(LENGTHS[:5], 16, seed=1)
    (batch,) = sampler.batches(0)
    assert sorted(batch.tolist()) == [0, 1, 2, 3, 4] and sampler.steps_per_epoch == 1


def test_buckets_leave_little_padding():
    def share_valid(bucket: bool) -> float:
        batches = TrainBatchSampler(LENGTHS, 8, seed=0, bucket=bucket).batches(0)
        return sum(LENGTHS[b].sum() for b in batches) / sum(LENGTHS[b].max() * len(b) for b in batches)

    assert share_valid(True) > 0.9 > 0.5 > share_valid(False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [0, 1, 5, 12, 29])
def test_partition_covers_a_batch_once_and_evenly(num_samples, world_size, accumulation):
    slices = [partition(num_samples, world_size, accumulation, rank) for rank in range(world_size)]
    parts = [range(num_samples)[s] for rank in slices for s in rank]
    assert len(parts) == world_size * accumulation
    assert sorted(i for part in parts for i in part) == list(range(num_samples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_ranks_get_neighbours_and_no_rank_always_the_longest():
    ranks = [partition(64, 4, 2, rank) for rank in range(4)]
    for step in range(2):
        starts = sorted(rank[step].start for rank in ranks)
        assert starts == list(range(32 * step, 32 * step + 32, 8))
    sums = [sum(sum(range(64)[s]) for s in rank) for rank in ranks]
    assert max(sums) == min(sums)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 4), (3, 2)])
def test_every_topology_sees_the_same_train_batches(world_size, accumulation):
    whole = list(loader().batches(0, 70))
    assert [batch.epoch for batch in whole] == [0] * 62 + [1] * 8
    shares = [list(loader(part=Part(world_size, rank, accumulation)).batches(0, 70)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        micro = [m for share in shares for m in share[step].micro_batches]
        order = torch.argsort(torch.cat([m["positions"] for m in micro]))
        assert len(micro) == world_size * accumulation
        for name in ("indices", "positions"):
            assert torch.equal(torch.cat([m[name] for m in micro])[order], batch.micro_batches[0][name])


def test_positions_are_places_in_the_epoch():
    positions = [b.micro_batches[0]["positions"] for b in loader().batches(0, 62)]
    assert torch.equal(torch.cat(positions), torch.arange(62 * 16))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_threads_and_restarts_do_not_change_the_batches(num_workers):
    expected = [b.micro_batches[0]["indices"] for b in loader().batches(0, 130)]
    options = loader(num_workers=num_workers)
    steps = [*options.batches(0, 55), *options.batches(55, 55), *options.batches(55, 130)]
    got = [b.micro_batches[0]["indices"] for b in steps]
    assert len(got) == 130 and all(map(torch.equal, expected, got))
    assert [b.epoch for b in steps] == [0] * 62 + [1] * 62 + [2] * 6


def test_more_ranks_than_samples_give_empty_micro_batches():
    sizes = []
    for rank in range(4):
        (batch,) = loader(lengths=LENGTHS[:3], part=Part(4, rank)).batches(0, 1)
        sizes.append(len(batch.micro_batches[0]["indices"]))
    assert sorted(sizes) == [0, 1, 1, 1]


def test_batches_are_prepared_while_the_consumer_works():
    def slow(*arguments):
        time.sleep(0.02)
        return collate(*arguments)

    waits = []
    for batch in loader(collate=slow).batches(0, 8):
        waits.append(batch.wait_seconds)
        time.sleep(0.05)
    assert waits[0] > 0.01 and max(waits[2:]) < 0.01
    (alone,) = loader(collate=slow, num_workers=0).batches(0, 1)
    assert alone.wait_seconds >= 0.02


def test_an_error_in_a_thread_is_raised_at_its_batch():
    def fail(dataset, indices, positions, epoch):
        if positions[0] == 3 * 16:
            raise ValueError("bad sample")
        return collate(dataset, indices, positions, epoch)

    batches = loader(collate=fail).batches(0, 10)
    for _ in range(3):
        next(batches)
    with pytest.raises(ValueError, match="bad sample"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_leaving_early_ends_the_threads():
    for _ in loader().batches(0, 62):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
