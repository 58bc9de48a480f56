"""Full disks, read-only ones, and folders that vanish while a run writes into them. The disks are real and small."""

import logging
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.engine.engine import TrainEngine
from ds_tokimg.errors import TrainingError
from tests.support.distributed import run_ranks, tiny_engine, train
from tests.support.runs import _train, metrics, small_flags, train_in_ranks

pytestmark = pytest.mark.usefixtures("cache")

QUIET = ("--eval_interval", 1000, "--epochs", 9, "--log_interval", 1)


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no disk can be made here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with open(disk / "filler", "ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def _harmed(dist, flags: list[str], harms: dict) -> tuple[str, str | None]:
    """A run in which rank 0 does `harms` {step: command}, after that step -> what was printed, the error's words."""
    step = TrainEngine.train_batch

    def train_batch(engine, *args):
        result = step(engine, *args)
        if dist.rank == 0 and engine.global_steps in harms:
            action, *places = harms[engine.global_steps]
            {"fill": fill, "remove": os.unlink, "delete": shutil.rmtree, "run": subprocess.check_call}[action](*places)
        return result

    TrainEngine.train_batch = train_batch
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("ds_tokimg").addHandler(handler)
    kept: list[str] = []
    from ds_tokimg.training.loop import Run

    log = Run.log
    Run.log = lambda run, line: (kept.append(line), log(run, line))[1]
    try:
        _train(dist, flags)
    except TrainingError as error:
        return "\n".join([*kept, *lines]), str(error)
    return "\n".join([*kept, *lines]), None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_for_a_while_costs_what_was_due_then(ranks, disk, corpus):
    folder = disk / "run"
    flags = small_flags(corpus, folder, *QUIET, "--max_steps", 16, "--save_interval", 4, "--keep_checkpoints", 2)
    harms = {5: ("fill", disk), 13: ("remove", disk / "filler")}  # rows of more than a page in between
    printed, error = run_ranks(ranks, _harmed, flags, harms)[0]
    assert error is None
    assert printed.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert printed.count("metrics.jsonl can be written again") == 1
    assert printed.count("the TensorBoard log cannot be written: No space left on device") <= 1
    assert [printed.count(f"step {step} is not saved: cannot write into") for step in (4, 8, 12, 16)] == [0, 1, 1, 0]
    assert "the disk is full (0.0 of 24.0 MiB" in printed
    assert "tries again at step 12" in printed and "tries again at step 16" in printed
    steps = [row["step"] for row in metrics(folder)]
    assert set(steps) >= {1, 2, 3, 4, 14, 15, 16} and steps == sorted(steps)
    root = folder / "checkpoints"
    assert sorted(path.name for path in root.glob("*step*")) == ["step_00000004", "step_00000016"]
    assert checkpoints.find(folder).name == "step_00000016"
    events = list((folder / "tensorboard").glob("events*"))
    assert len(events) == 1 and 16 in _readable(events[0])


def _readable(path: Path) -> list[int]:
    """The steps of all records of an event file, which TensorBoard's reader stops at where one is cut off."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [event.step for event in EventFileLoader(str(path)).Load()]


def test_a_last_save_that_fails_is_a_failed_run(disk, corpus):
    folder = disk / "run"
    flags = small_flags(corpus, folder, *QUIET, "--max_steps", 6, "--save_interval", 2)
    _, error = run_ranks(1, _harmed, flags, {5: ("fill", disk)})[0]
    assert error.startswith(f"cannot write into {folder}: the disk is full") and error.endswith("are as they were")
    assert sorted(path.name for path in (folder / "checkpoints").glob("*step*")) == ["step_00000002", "step_00000004"]
    assert checkpoints.find(folder).name == "step_00000004"


def test_what_a_killed_save_left_does_not_fill_the_disk_for_ever(disk, corpus):
    folder = disk / "run"
    train_in_ranks(1, small_flags(corpus, folder, *QUIET))
    left = folder / "checkpoints" / ".unfinished_step_00000005"
    left.mkdir()
    fill(disk)
    (disk / "filler").rename(left / "weights")
    train_in_ranks(1, ["--resume", str(folder), "--max_steps", "5"])
    assert checkpoints.find(folder).name == "step_00000005" and not left.exists()


def test_a_disk_that_is_full_from_the_start_is_one_message(disk, corpus):
    fill(disk)
    with pytest.raises(AssertionError, match=r"UserError: --output_dir .* cannot be written: No space left on device"):
        train_in_ranks(1, small_flags(corpus, disk / "run"))


def test_a_folder_that_is_deleted_is_not_made_again(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = small_flags(corpus, folder, *QUIET, "--max_steps", 6, "--save_interval", 2)
    printed, error = run_ranks(2, _harmed, flags, {3: ("delete", folder)})[0]
    assert printed.count("metrics.jsonl cannot be written") == 1 and printed.count("step 4 is not saved") == 1
    assert error == f"{folder} is gone (deleted or moved while the run was writing into it)"
    assert not folder.exists()


def test_a_folder_that_becomes_read_only_is_one_message(disk, corpus):
    folder = disk / "run"
    flags = small_flags(corpus, folder, *QUIET, "--max_steps", 7, "--save_interval", 3)
    # A second mount, as a disk with files that are open for writing does not become read-only.
    mounts = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"
    printed, error = run_ranks(1, _harmed, flags, {4: ("run", ["sh", "-c", mounts])})[0]
    assert printed.count("metrics.jsonl cannot be written: Read-only file system") == 1
    assert printed.count("step 6 is not saved: cannot write into") == 1
    assert "Read-only file system" in error and checkpoints.find(folder).name == "step_00000003"


def _save_on_ranks_own_disks(dist, folder, stage, full):
    """Saves of which the second fails on rank `full` alone -> what each of them led to."""
    engine = tiny_engine(dist, stage)
    outcomes = []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for _ in range(3):
        train(engine, 1)
        limit = 256 if dist.rank == full and engine.global_steps == 2 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            outcomes.append(engine.save(folder, {"step_of": engine.global_steps}).name)
        except TrainingError as error:
            outcomes.append(str(error))
    return outcomes, sorted(path.name for path in (folder / "checkpoints").glob("*step*"))


@pytest.mark.parametrize(("stage", "full"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_the_full_disk_of_one_rank_is_known_to_all(stage, full, tmp_path):
    first, second = run_ranks(2, _save_on_ranks_own_disks, tmp_path, stage, full)
    assert first == second
    (one, problem, three), found = first
    assert problem.startswith(f"cannot write into {tmp_path} (rank {full}): File too large"), problem
    assert [one, three] == found == ["step_00000001", "step_00000003"]
