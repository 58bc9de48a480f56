"""What a run survives: going back, kills, second trainers, signals. Each test does the harm."""

import shutil
from pathlib import Path

import pytest

from ds_tokimg.engine import checkpoint
from tests.support.runs import small_flags, train_in_ranks, write_corpus


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A finished run of 6 steps, with a checkpoint and a validation every other step. Its name is a pattern."""
    folder = tmp_path_factory.mktemp("runs") / "run[1] *"
    every = ("--max_steps", 6, "--save_interval", 2, "--eval_interval", 2)
    train_in_ranks(1, small_flags(corpus, folder, *every))
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def named(folder: Path, pointer: str) -> str:
    return (folder / "checkpoints" / pointer).read_text().strip()


def test_what_a_run_goes_back_from_is_set_aside(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    earlier = folder / "checkpoints" / "step_00000002"
    later = (folder / "checkpoints" / "step_00000006" / "manifest.json").read_bytes()
    assert named(folder, "best") == "step_00000006"
    train_in_ranks(1, ["--resume", str(earlier), "--max_steps", "3"])
    assert checkpoints(folder) == ["step_00000002", "step_00000003"]
    assert named(folder, "latest") == "step_00000003"
    assert named(folder, "best") in checkpoints(folder)
    aside = folder / "checkpoints" / "abandoned"
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000004", "step_00000006"]
    assert (aside / "step_00000006" / "manifest.json").read_bytes() == later
    (folder / "checkpoints" / "step_00000003" / "rng.pt").unlink()
    assert checkpoint.find(folder) == earlier


def test_going_back_loses_nothing_before_its_first_save(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    flags = ["--resume", str(folder / "checkpoints" / "step_00000002"), "--max_steps", "2"]
    train_in_ranks(1, flags)  # not a step, not a save
    assert checkpoints(folder) == checkpoints(run)
    assert named(folder, "latest") == "step_00000006"
