"""What the validations of a run read: a fair sample, the same each time, that costs what it should."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.training import budget
from ds_tokimg.training.bound import DEFAULT_LEVELS
from tests.support.runs import learned, metrics, small_flags, train_in_ranks, write_corpus


class Texts:
    """Lengths in the shape of a data set; each token is the length of its text."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)
        self.num_tokens, self.num_bytes = int(self.lengths.sum()), 3 * int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> np.ndarray:
        return np.full(self.lengths[index], self.lengths[index])


def parts_of(train: int, held_out) -> SimpleNamespace:
    """A run that trains on `train` texts of 100 tokens; its bound has no pass in which tokens are drawn."""
    model = SimpleNamespace(writing=Writing(0), codec=SimpleNamespace(radix=8))
    return SimpleNamespace(
        train_set=Texts([100] * train),
        eval_set=Texts(held_out),
        module=SimpleNamespace(model=model),
        steps_per_epoch=lambda size: train // size,
    )


def config_of(**changes):
    config = train_config(["--data_path", "x", "--epochs", "1", "--train_batch_size", "10"])
    return dataclasses.replace(config, **changes)


def decided(config, parts) -> budget.Validations:
    return budget.Validations(budget.decide(config, parts)[0], parts)


def test_the_budget_is_a_share_of_the_training():
    """In units of a token that is trained on, on the way and in all."""
    parts = parts_of(100_000, [100] * 5000)
    config = config_of(eval_interval=1000)
    validations = decided(config, parts)
    price = budget.LEVELS * budget.LEVEL_COST
    on_the_way = validations.tokens(1000) * price
    assert on_the_way == pytest.approx(budget.ON_THE_WAY * 1000 * 10 * 100, rel=0.01)
    assert validations.levels == budget.LEVELS and not validations.reads_all(10_000)  # too many to read them all
    few = decided(config, parts_of(100_000, [100] * 3300))
    assert few.reads_all(10_000) and not few.reads_all(9_000)
    assert few.tokens(10_000) * price <= budget.AT_END * 10_000 * 10 * 100
    assert few.tokens(10_000) * price + 9 * few.tokens(1000) * price < 0.06 * 10_000 * 10 * 100


def test_a_short_run_reads_a_few_texts_all_the_same():
    validations = decided(config_of(eval_interval=1), parts_of(1000, [100] * 500))
    assert validations.count == budget.FEWEST_TEXTS
    assert decided(config_of(eval_interval=1), parts_of(1000, [100] * 5)).count == 5


@pytest.mark.parametrize(("tokens", "count", "levels"), [(0, 50, 8), (500, 5, 4), (5000, 50, 4), (10_000, 50, 8)])
def test_a_budget_that_is_given_stays(tokens, count, levels):
    config, words = budget.decide(config_of(eval_tokens=tokens), parts_of(1000, [100] * 50))
    validations = budget.Validations(config, parts_of(1000, [100] * 50))
    assert (config.eval_tokens, words, validations.count, validations.levels) == (tokens, [], count, levels)


def test_all_texts_are_read_in_their_own_order_as_by_evaluate():
    validations = decided(config_of(eval_tokens=0), parts_of(1000, range(1, 30)))
    assert validations.levels == DEFAULT_LEVELS
    assert [validations.texts(3).ids(i)[0] for i in range(29)] == list(range(1, 30))


def test_the_same_whole_texts_each_time_and_first_of_all_at_the_end():
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    validations = decided(config_of(eval_tokens=1000, seed=7), parts_of(100_000, lengths))
    again = decided(config_of(eval_tokens=1000, seed=8), parts_of(100_000, lengths))
    early, late = validations.texts(10), again.texts(20)
    assert early.indices.tolist() == late.indices.tolist() and len(set(early.indices)) == len(early) < 200
    last = validations.texts(validations.last_step)
    assert sorted(last.indices) == list(range(200)) and last.indices[: len(early)].tolist() == early.indices.tolist()
    assert all(np.array_equal(last.ids(i), early.ids(i)) for i in range(len(early)))
    assert all(len(early.ids(i)) == lengths[early.indices[i]] for i in range(len(early)))
    assert early.num_bytes == pytest.approx(3 * lengths[early.indices].sum(), abs=1)


def test_no_text_is_more_likely_than_another():
    """Over data sets of many sizes: whatever a text is worth, the sample's mean is that of all, within its error."""
    scores, places = [], []
    for size in range(300, 700):
        lengths = np.sort(np.random.default_rng(size).integers(1, 200, size))  # in order: place tells length
        indices = budget.Validations(config_of(eval_tokens=3000), parts_of(1000, lengths)).texts(1).indices
        error = lengths.std(ddof=1) * np.sqrt((1 - len(indices) / size) / len(indices))
        scores.append((lengths[indices].mean() - lengths.mean()) / error)
        places += (indices / size).tolist()
    assert abs(np.mean(scores)) < 4 / np.sqrt(400) and 0.85 < np.std(scores) < 1.15
    shares = np.histogram(places, 10, (0, 1))[0] / len(places)
    assert abs(shares - 0.1).max() < 4 * np.sqrt(0.09 / len(places))


def test_figures_of_other_texts_do_not_compare():
    parts = parts_of(1000, [100] * 50)
    whole, some = (budget.Validations(config_of(eval_tokens=n), parts) for n in (0, 1000))
    assert whole.were({}) and whole.were({"validations": whole.state()})  # runs from before there was a budget
    assert not some.were({}) and not some.were({"validations": whole.state()})


# ---- runs ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_corpus(tmp_path_factory.mktemp("corpus"), documents=3000)


def flags(corpus, folder, *more) -> list[str]:
    return small_flags(corpus, folder, "--eval_fraction", 0.2, "--eval_tokens", 1500, *more)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """6 steps, validated every other one on a sample."""
    folder = tmp_path_factory.mktemp("run") / "run"
    printed = train_in_ranks(1, flags(corpus, folder, "--max_steps", 6, "--eval_interval", 2, "--save_interval", 2))
    return folder, printed


def test_ranks_read_the_same_texts(run, corpus, tmp_path):
    train_in_ranks(2, flags(corpus, tmp_path / "run", "--max_steps", 6, "--eval_interval", 2))
    for row, other in zip(metrics(run[0]), metrics(tmp_path / "run"), strict=True):
        assert row.get("val_tokens") == other.get("val_tokens")
        for key in ("val_bits_per_token", "val_bits_per_token_error"):
            assert other.get(key, 0) == pytest.approx(row.get(key, 0), rel=1e-4)
    assert 1400 < row["val_tokens"] < 1600 and 0 < row["val_bits_per_token_error"] < 0.5
    assert f"± {1.96 * row['val_bits_per_token_error']:.4f} (95 %)" in run[1]


def test_a_resumed_run_reads_them_too_and_another_budget_finds_the_best_anew(run, corpus, tmp_path):
    folder = tmp_path / "run"
    every = ("--eval_interval", 2, "--save_interval", 2)
    train_in_ranks(1, flags(corpus, folder, "--max_steps", 4, *every))
    resume = ["--resume", "latest", "--output_dir", str(folder)]
    assert "found anew" not in train_in_ranks(1, [*resume, "--max_steps", "6"])
    assert learned(metrics(folder)) == learned(metrics(run[0]))
    printed = train_in_ranks(1, [*resume, "--max_steps", "8", "--eval_tokens", "0"])
    assert "validations read other texts than before: the best checkpoint is found anew" in printed
    assert (folder / "checkpoints" / "best").read_text().strip() == "step_00000008"


def test_a_whole_schedule_ends_with_all_texts(corpus, tmp_path):
    """And its best checkpoint is still the best on the texts of all validations."""
    folder = tmp_path / "run"
    few = ("--eval_fraction", 0.02, "--eval_tokens", 200, "--epochs", 1, "--max_steps", 10_000, "--eval_interval", 40)
    printed = train_in_ranks(1, flags(corpus, folder, *few, "--save_interval", 40))
    rows = [row for row in metrics(folder) if "val_tokens" in row]
    assert len(rows) >= 2 and rows[-1]["val_tokens"] > 2 * rows[-2]["val_tokens"]
    assert "the last validation reads all" in printed
