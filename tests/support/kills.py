"""A run that is killed again and again, and goes on each time.

Forked ranks train; rank 0 counts what it does (files that it opens, renames or removes, steps, batches of validations),
and at one of these moments SIGKILL ends it, another rank, or all of them. A seed decides the moments, so that they are
found again.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.support.distributed import start_ranks
from tests.support.runs import _train, learned, small_flags, train_in_ranks

SAVE, VALIDATE = 2, 4  # a run does so every so many steps
# Where kills fall, and how many moments a start of these runs has there, about.
MOMENTS = {"save": 55, "start": 60, "validation": 17, "step": 3}
PLACES = ("save", "save", "save", "start", "validation", "step")
LONGEST_DELAY = 0.02  # seconds; a file takes less, a step takes as long
_ON_FILES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class Kill:
    """SIGKILL to `victims`, some `delay` in seconds after rank 0 came to the `count`-th moment in a `place`."""

    place: str
    count: int
    delay: float
    victims: tuple[int, ...]


@dataclass
class Outcome:
    """What a kill hit, and what was found after it."""

    place: str
    victims: tuple[int, ...]
    orphans: int  # processes that did not end by themselves
    rows: list[dict]  # of metrics.jsonl


def draw(seed: int, number: int, world_size: int) -> list[Kill]:
    """Kills; the first two fall into the very first save of the run."""
    source, drawn = random.Random(seed), []
    everyone = tuple(range(world_size))
    for index in range(number):
        place = "save" if index < 2 else source.choice(PLACES)
        delay = source.choice((0.0, source.uniform(0, LONGEST_DELAY)))
        victims = source.choice((everyone, (source.choice(everyone),)))
        drawn.append(Kill(place, source.randint(1, MOMENTS[place]), delay, victims))
    return drawn


def kill_again_and_again(corpus: Path, folder: Path, kills: list[Kill], world_size: int) -> list[Outcome]:
    """Starts the run as often as it is killed, with `--resume auto`."""
    return [_killed(_flags(corpus, folder), folder, kill, world_size) for kill in kills]


def finish(corpus: Path, folder: Path, step: int, world_size: int) -> None:
    """Trains up to a step, from the newest checkpoint where there is one."""
    train_in_ranks(world_size, [*_flags(corpus, folder), "--max_steps", str(step)], timeout=600)


def same_so_far(rows: list[dict], whole: list[dict]) -> bool:
    """Whether each row is that of the uninterrupted run, to the bit. A validation that was cut off has no figures."""
    return all(row.items() <= whole[row["step"] - 1].items() for row in rows)


def weights_of(folder: Path) -> dict[str, bytes]:
    """All checkpoints' names, what `latest` and `best` name, and the newest weights and averages."""
    root = folder / "checkpoints"
    latest = root / (root / "latest").read_text().strip()
    named = {name: (root / name).read_bytes() for name in ("latest", "best")}
    weights = {path.name: path.read_bytes() for path in latest.glob("*.safetensors")}
    return named | weights | {path.name: b"" for path in root.iterdir() if path.name not in named}


def leftovers(folder: Path) -> list[str]:
    """Files and folders that a finished run does not have: unfinished, temporary, a lock."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return [name for name in names if "/." in f"/{name}" or name == "run.lock" or ".tmp" in name]


def rows_of(folder: Path) -> list[dict]:
    """What was learnt so far; none before the first row. A last line that was cut off is no row."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return learned([json.loads(line) for line in lines if line.endswith("\n")])


def _flags(corpus: Path, folder: Path) -> list[str]:
    often = ("--epochs", 100, "--max_steps", 2000, "--save_interval", SAVE, "--eval_interval", VALIDATE)
    return small_flags(corpus, folder, *often, "--resume", "auto")


def _killed(flags: list[str], folder: Path, kill: Kill, world_size: int) -> Outcome:
    told = folder.with_name(f"{folder.name}.killed")
    told.unlink(missing_ok=True)
    processes, _ = start_ranks(world_size, _train_until_killed, flags, folder, kill, timeout_minutes=2)
    numbers = [process.pid for process in processes]
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    orphans = len(_sessions(numbers))
    for process in processes:
        process.kill()
        process.join()
    place = told.read_text() if told.is_file() else "never"
    return Outcome(place, kill.victims, orphans, rows_of(folder))


def _sessions(numbers: list[int], seconds: float = 5.0) -> list[int]:
    """Processes of these sessions that are left after some seconds."""
    deadline = time.monotonic() + seconds
    while (left := [each for each in _alive() if each[1] in numbers]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [number for number, _ in left]


def _alive() -> list[tuple[int, int]]:
    """(process, session) of all that run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (process / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue  # it has ended
        if state != "Z":
            found.append((int(process.name), int(session)))
    return found


def _train_until_killed(dist, flags: list[str], folder: Path, kill: Kill) -> str:
    os.setsid()  # by which what it starts is found
    processes = dist.gather(os.getpid())
    if dist.rank == 0:
        _Killer(folder, kill, processes).watch()
    return _train(dist, flags)


class _Killer:
    """Counts what rank 0 does, and kills when it has come to the moment."""

    def __init__(self, folder: Path, kill: Kill, processes: list[int]):
        self.folder, self.kill, self.processes = folder, kill, processes
        self.place, self.seen, self.begun = "start", Counter(), False

    def watch(self) -> None:
        from ds_tokimg.engine import checkpoint
        from ds_tokimg.engine.engine import TrainEngine
        from ds_tokimg.training.loop import Run

        self._mark(checkpoint, "save", "save")
        self._mark(Run, "_validate_now", "validation")
        self._mark(TrainEngine, "train_batch", "step")
        self._mark(TrainEngine, "asked_to_stop", None)
        sys.addaudithook(self._heard)

    def _mark(self, owner: object, function: str, place: str | None) -> None:
        """Calls of a function are moments, and what is done within is done in that place."""
        real = getattr(owner, function)

        @functools.wraps(real)
        def marked(*args, **options):
            before, self.place = self.place, place or self.place
            self._moment()
            try:
                return real(*args, **options)
            finally:
                self.place = "step" if before == "start" else before

        setattr(owner, function, marked)

    def _heard(self, event: str, args: tuple) -> None:
        if event in _ON_FILES and threading.current_thread() is threading.main_thread():
            below = event in ("os.remove", "os.rmdir") and args[-1] != -1  # of a folder that is being removed
            if below or str(args[0]).startswith(str(self.folder)):
                self._moment()

    def _moment(self) -> None:
        """One too many where the start is over: a start that goes on has fewer moments than another."""
        self.seen[self.place] += 1
        late = self.kill.place == "start" != self.place
        due = late or (self.place == self.kill.place and self.seen[self.place] == self.kill.count)
        if due and not self.begun:
            self.begun = True
            if self.kill.delay:
                threading.Timer(self.kill.delay, self._strike).start()
            else:
                self._strike()

    def _strike(self) -> None:
        self.folder.with_name(f"{self.folder.name}.killed").write_text(self.place)
        for rank in sorted(self.kill.victims, reverse=True):  # itself last
            os.kill(self.processes[rank], signal.SIGKILL)
