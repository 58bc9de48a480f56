"""What a run survives: going back, kills, second trainers, signals. Each test does the harm."""

import contextlib
import itertools
import json
import os
import pickle
import pkgutil
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ds_tokimg.engine import checkpoint
from ds_tokimg.errors import UserError
from ds_tokimg.training import lock, signals
from tests.support.distributed import run_ranks, start_ranks
from tests.support.runs import _train, learned, metrics, small_flags, train_in_ranks

pytestmark = pytest.mark.usefixtures("cache")


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


def _train_until(dist, flags: list[str], where: str, function: str, sent: dict[int, list[int]], rank: int) -> str:
    """A run in which a rank sends itself signals where it would make some calls of a function: {call: signals}."""
    target, calls = pkgutil.resolve_name(where), itertools.count(1)
    real = getattr(target, function)

    def harmed(*args, **options):
        for number in sent.get(next(calls), ()):
            os.kill(os.getpid(), number)
        return real(*args, **options)

    if dist.rank == rank:
        setattr(target, function, harmed)
    return _train(dist, flags)


def kill_in(flags: list[str], where: str, function: str, call: int = 1) -> None:
    (process,), _ = start_ranks(1, _train_until, flags, where, function, {call: [signal.SIGKILL]}, 0)
    process.join(200)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]], ids=["start", "auto"])
def test_killed_in_its_first_save_a_run_starts_again(resume, run, corpus, tmp_path):
    every = ("--max_steps", 4, "--save_interval", 2, "--eval_interval", 2)
    flags = small_flags(corpus, tmp_path / "run", *every)
    kill_in(flags, "ds_tokimg.engine.checkpoint", "_publish")
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {".unfinished_step_00000002", ".latest.new"}
    train_in_ranks(1, [*flags, *resume])
    assert learned(metrics(tmp_path / "run")) == learned(metrics(run)[:4])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("call, name", [(1, "config.json"), (2, "ds_config_given.json"), (3, "ds_config.json")])
def test_killed_while_its_settings_are_replaced_a_run_is_as_it_was(call, name, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    flags = ["--resume", "latest", "--output_dir", str(folder), "--max_steps", "7"]
    before = (folder / name).read_bytes()
    kill_in(flags, "os", "replace", call)
    assert (folder / f"{name}.tmp").is_file() and (folder / name).read_bytes() == before
    train_in_ranks(1, flags)
    assert [row["step"] for row in metrics(folder)] == list(range(1, 8))


def test_the_tokenizer_of_a_resumed_run_is_not_touched(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in (folder / "tokenizer").iterdir()}
    train_in_ranks(1, ["--resume", str(folder), "--max_steps", "7"])
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in (folder / "tokenizer").iterdir()} == before


def test_a_checkpoint_of_another_run_is_not_resumed_into_a_run(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    flags = ["--resume", str(run / "checkpoints" / "step_00000004"), "--output_dir", str(folder), "--max_steps", "5"]
    with pytest.raises(AssertionError, match=r"already holds a run, and .* is not of it"):
        train_in_ranks(1, flags)
    assert checkpoints(folder) == checkpoints(run)


@contextlib.contextmanager
def running(flags: list[str], until: Path):
    """A run in a process of its own, once it has written `until`; killed at the end."""
    (process,), _ = start_ranks(1, _train, flags)
    try:
        deadline = time.monotonic() + 200
        while not until.exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("config.json", "ds_config.json", "run.lock")}


def test_a_folder_has_one_writer_and_a_killed_one_is_succeeded(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = small_flags(corpus, folder, "--epochs", 50, "--max_steps", 2000, "--save_interval", 2)
    with running(flags, folder / "checkpoints" / "latest") as first:
        before = contents(folder)
        others = (["--resume", "latest", "--output_dir", str(folder)], [*flags, "--resume", "auto", "--lr", "1"], flags)
        for other in others:
            with pytest.raises(
                AssertionError, match=rf"is in use: process {first.pid} on \S+ has been writing .* since"
            ):
                train_in_ranks(1, other)
        command = [sys.executable, "-m", "ds_tokimg", "train", *others[0]]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert outcome.returncode == 2 and "is in use" in outcome.stderr and "Traceback" not in outcome.stderr
        assert first.is_alive() and contents(folder) == before
    assert (folder / "run.lock").is_file()
    step = int(named(folder, "latest").removeprefix("step_"))
    train_in_ranks(1, [*others[0], "--max_steps", str(step + 1)])
    assert len(metrics(folder)) == step + 1
    assert not (folder / "run.lock").exists()


def test_of_two_that_start_at_once_one_runs(corpus, tmp_path):
    flags = [small_flags(corpus, tmp_path / "run", "--lr", lr, "--max_steps", 30, "--epochs", 9) for lr in (1e-3, 2e-3)]
    started = [start_ranks(1, _train, own) for own in flags]
    outcomes = [pickle.loads(results.get(timeout=300))[2] for _, results in started]
    for (process,), _ in started:
        process.kill()
        process.join()
    (winner,) = (place for place in range(2) if outcomes[place] is None)
    assert "is in use" in outcomes[1 - winner]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == (1e-3, 2e-3)[winner]
    assert len(metrics(tmp_path / "run")) == 30


def test_the_lock_of_another_host_is_reported_with_its_age(run):
    path = run / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "began": time.time() - 3 * 3600}))
    try:
        words = r"process 7 on elsewhere has been writing a run into it since 3 hours. .* rm '.*run\.lock'"
        with pytest.raises(AssertionError, match=words):
            train_in_ranks(1, ["--resume", "latest", "--output_dir", str(run)])
        assert json.loads(path.read_text())["host"] == "elsewhere"
    finally:
        path.unlink()


def left_elsewhere(folder: Path, seconds: float) -> lock.Lock:
    """The lock of a process on another host, whose last sign of life was so many seconds ago."""
    path = folder / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "began": time.time() - 3600, "beats": True}))
    os.utime(path, (time.time() - seconds,) * 2)
    return lock.Lock(folder)


def test_a_silent_writer_on_another_host_is_succeeded(tmp_path, monkeypatch, caplog):
    """After a node is lost its job is started again on another one."""
    monkeypatch.setattr(lock, "SILENT_SECONDS", 100.0)
    successor = left_elsewhere(tmp_path, 99.0)
    with caplog.at_level("INFO"):
        successor.take()  # after a second more
    assert "waiting up to 1 s for a sign of life" in caplog.text and "process 7 on elsewhere" in caplog.text
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    successor.release()
    assert not list(tmp_path.iterdir())


def test_a_writer_on_another_host_that_shows_that_it_lives_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.4)
    second = left_elsewhere(tmp_path, 0.0)
    beat = threading.Timer(0.5, os.utime, [tmp_path / "run.lock"])
    beat.start()
    with pytest.raises(UserError, match=r"process 7 on elsewhere has been writing .* Wait until it has ended"):
        second.take()


BEATING = """
import sys, time
from pathlib import Path
from ds_tokimg.training import lock
lock.BEAT_SECONDS = 0.1
own = lock.Lock(Path(sys.argv[1]))
own.take()
for _ in range(100):
    time.sleep(0.1)
    own.beat()
"""


def test_an_owner_shows_that_it_lives_and_leaves_where_it_was_succeeded(tmp_path):
    path = tmp_path / "run.lock"
    with subprocess.Popen([sys.executable, "-c", BEATING, str(tmp_path)], stderr=subprocess.PIPE, text=True) as owner:
        while not path.exists() or not path.read_text():
            time.sleep(0.05)
        os.utime(path, (0, 0))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 10
        path.write_text(json.dumps({"host": "elsewhere", "pid": 8, "beats": True}))
        assert owner.wait(timeout=60) == 1 and "elsewhere took" in owner.stderr.read()
    assert json.loads(path.read_text())["pid"] == 8


def test_a_start_that_is_refused_leaves_no_folder(corpus, tmp_path):
    with pytest.raises(AssertionError, match="UserError"):
        train_in_ranks(1, small_flags(corpus, tmp_path / "new" / "run", "--tokenizer_path", tmp_path / "none"))
    assert not (tmp_path / "new").exists()


ENGINE = "ds_tokimg.engine.engine:TrainEngine"
VALIDATING = {3: [signal.SIGTERM]}  # the first call of asked_to_stop is after the save, the others are between batches


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_during_a_validation_costs_nothing(number, run, corpus, tmp_path):
    """What was due is saved first, and the validation is done when the run goes on: it is the uninterrupted one."""
    folder = tmp_path / "run"
    flags = small_flags(corpus, folder, "--max_steps", 6, "--save_interval", 2, "--eval_interval", 2)
    if number == signal.SIGKILL:
        kill_in(flags, ENGINE, "asked_to_stop", 3)
    else:
        printed = run_ranks(1, _train_until, flags, ENGINE, "asked_to_stop", {3: [number]}, 0)[0]
        assert "the validation is given up" in printed and "stopped by a signal at step 2" in printed
        assert "train --resume latest" in printed.split("stopped by")[1]
        assert not (folder / "run.lock").exists()
    assert checkpoints(folder) == ["step_00000002"] and "val_loss" not in metrics(folder)[1]
    train_in_ranks(1, ["--resume", "latest", "--output_dir", str(folder), "--max_steps", "6"])
    assert learned(metrics(folder)) == learned(metrics(run))
    assert named(folder, "best") == named(run, "best")
    for tag in checkpoints(run):
        states = [checkpoint.read_state(place / "checkpoints" / tag) for place in (folder, run)]
        assert all(states[0][key] == states[1][key] for key in ("best", "best_step", "bits_per_token"))


def test_all_ranks_leave_a_validation_when_one_is_asked_and_save_what_was_not_due(corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", "--save_interval", 4, "--eval_interval", 1)
    printed = run_ranks(2, _train_until, flags, ENGINE, "asked_to_stop", VALIDATING, 1)[0]
    assert "stopped by a signal at step 1" in printed
    assert checkpoints(tmp_path / "run") == ["step_00000001"]
    assert "val_loss" in _resumed_rows(tmp_path / "run")[0]


def _resumed_rows(folder: Path) -> list[dict]:
    train_in_ranks(1, ["--resume", str(folder), "--max_steps", "2"])
    return metrics(folder)


def test_a_signal_during_a_save_ends_the_run_after_it(corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", "--save_interval", 2)
    where = ("ds_tokimg.engine.checkpoint", "_publish")
    printed = run_ranks(1, _train_until, flags, *where, {1: [signal.SIGTERM]}, 0)[0]
    assert "stopped by a signal at step 2" in printed and checkpoints(tmp_path / "run") == ["step_00000002"]


def test_a_signal_during_the_final_samples_is_a_clean_end(corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", "--max_steps", 2, "--num_samples", 1)
    where = ("ds_tokimg.training.ending", "generate")
    printed = run_ranks(1, _train_until, flags, *where, {1: [signal.SIGINT]}, 0)[0]
    assert "no more samples: the run is complete, and saved" in printed and "resume:" in printed
    assert named(tmp_path / "run", "latest") == "step_00000002"


def _train_with_impatience(dist, flags: list[str]) -> str:
    signals.SAME_REQUEST_SECONDS = 0.0
    return _train_until(dist, flags, ENGINE, "asked_to_stop", {3: [signal.SIGTERM, signal.SIGTERM]}, 0)


def test_a_second_signal_ends_the_run_at_once(corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", "--save_interval", 2, "--eval_interval", 2)
    (process,), _ = start_ranks(1, _train_with_impatience, flags)
    process.join(200)
    assert process.exitcode == -signal.SIGTERM
    assert named(tmp_path / "run", "latest") == "step_00000002"


def test_one_request_that_arrives_twice_is_one(corpus, tmp_path):
    """A terminal signals every process, and launchers pass it on to their ranks."""
    flags = small_flags(corpus, tmp_path / "run", "--save_interval", 2, "--eval_interval", 2)
    twice = {3: [signal.SIGINT, signal.SIGTERM]}
    assert "stopped by a signal" in run_ranks(1, _train_until, flags, ENGINE, "asked_to_stop", twice, 0)[0]
