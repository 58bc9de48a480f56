"""Streamed runs: as from the cache, the same on any number of ranks, and bit for bit when they go on."""

import contextlib
import shutil
from pathlib import Path

import pytest

from ds_tokimg.__main__ import main
from ds_tokimg.data import files, stream, tokenise
from tests.support.distributed import run_ranks
from tests.support.runs import _train, learned, metrics, small_flags, train_in_ranks

pytestmark = pytest.mark.usefixtures("cache")

STEPS = 24
LONG = (
    "--streaming",
    "--epochs",
    4,
    "--eval_interval",
    12,
    "--save_interval",
    5,
    "--keep_checkpoints",
    9,
    "--max_steps",
    STEPS,
)


@contextlib.contextmanager
def small_windows():
    """Groups of about 1000 bytes and windows of 2000 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (files, tokenise, stream):
            patch.setattr(module, "BLOCK_BYTES", 1000)
        patch.setattr(stream, "WINDOW_TOKENS", 2000)
        patch.setattr(stream, "SAMPLE_BYTES", 4000)
        yield


def train_small(dist, flags: list[str]) -> str:
    with small_windows():
        return _train(dist, flags)


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    """A run of several windows and more than one epoch."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    (printed,) = run_ranks(1, train_small, small_flags(corpus, folder, *LONG), timeout=120)
    assert "of a sample" in printed and metrics(folder)[-1]["epoch"] >= 1
    return folder


def test_a_corpus_of_one_window_is_trained_on_as_from_the_cache(corpus, tmp_path, monkeypatch):
    flags = ["--epochs", 2, "--max_steps", 30, "--eval_interval", 10]
    train_in_ranks(1, small_flags(corpus, tmp_path / "cached", *flags))
    empty = tmp_path / "nothing"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(empty))
    train_in_ranks(1, small_flags(corpus, tmp_path / "streamed", *flags, "--streaming", "--num_workers", 0))
    rows = learned(metrics(tmp_path / "cached"))
    assert rows[-1]["epoch"] == 1 and rows == learned(metrics(tmp_path / "streamed"))
    assert not empty.exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_not_change_the_run(straight, ranks, corpus, tmp_path):
    run_ranks(ranks, train_small, small_flags(corpus, tmp_path / "run", *LONG), timeout=120)
    for one, many in zip(metrics(straight), metrics(tmp_path / "run"), strict=True):
        assert one["valid_tokens"] == many["valid_tokens"] and one["epoch"] == many["epoch"]
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("step", [5, 20])
def test_a_run_goes_on_bit_for_bit(straight, step, tmp_path):
    """Within an epoch and after the first."""
    shutil.copytree(straight, tmp_path / "run")
    for later in (tmp_path / "run" / "checkpoints").glob("step_*"):
        if later.name > f"step_{step:08d}":
            shutil.rmtree(later)
    at = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
    flags = ["--resume", at, "--output_dir", tmp_path / "run", "--max_steps", STEPS]
    run_ranks(1, train_small, list(map(str, flags)), timeout=120)
    rows = learned(metrics(straight))
    assert (rows[step]["epoch"] > 0) == (step == 20)
    assert learned(metrics(tmp_path / "run"))[step:] == rows[step:]


def test_other_texts_are_refused(straight, corpus, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    other = tmp_path / "corpus.txt"
    other.write_bytes(corpus.read_bytes() + b"one more text\n")
    with small_windows():
        assert main(["train", "--resume", "--output_dir", str(tmp_path / "run"), "--data_path", str(other)]) == 2
    assert "the training texts, or their order, are others" in capsys.readouterr().err


def test_evaluate_measures_the_texts_that_the_run_held_out(straight, corpus, capsys):
    """The sample's: the same figure as the last validation of the run, which read all of them."""
    with small_windows():
        assert main(["evaluate", "--checkpoint", str(straight), "--data_path", str(corpus)]) == 0
    printed, rows = capsys.readouterr().out, metrics(straight)
    best = min(row["val_bits_per_token"] for row in rows if "val_bits_per_token" in row)
    assert "measured on the held-out texts" in printed and "of a sample" in printed
    assert f"bits per token {best:.4f}" in printed


def test_plan_and_preview_look_at_the_sample(corpus, tmp_path, capsys):
    with small_windows():
        for command in ("plan", "preview"):
            flags = [*small_flags(corpus, tmp_path / "run", "--streaming")]
            assert main([command, *flags]) == 0
            assert "of a sample" in " ".join(capsys.readouterr().out.split())


def test_a_run_stays_streamed(straight, capsys):
    assert main(["train", "--resume", "latest", "--output_dir", str(straight), "--no_streaming"]) == 2
    assert "streaming" in capsys.readouterr().err
