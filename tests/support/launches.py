"""Runs under each launcher, and what is left of them after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.distributed import free_port
from tests.support.runs import metrics

# A launcher imports torch in up to four processes, one after another, before the first step: 20 s on two idle cores.
START_SECONDS = 400.0
FLAGS = "--data_path corpus.txt --model JiT-XS/4 --img_size 16 --max_tokens 64 --vocab_size 300 --train_batch_size 8"
INTERVALS = "--log_interval 1 --eval_interval 1000 --save_interval 1000 --num_samples 0 --epochs 100"
COMMANDS = {
    "deepspeed": "deepspeed -q --no_local_rank --num_accelerators 2 --master_port {port} --module ds_tokimg train",
    "torchrun": "torchrun --nproc_per_node 2 --master_port {port} -m ds_tokimg train",
    "train.sh": "bash launch/train.sh",
}


@dataclass(frozen=True)
class Case:
    """A signal `to` the process that was started (`launcher`), a `rank`, or `all` processes of the run."""

    launcher: str
    signal: signal.Signals
    to: str

    def __str__(self) -> str:
        return f"{self.launcher}-{self.signal.name}-{self.to}"


@dataclass
class Outcome:
    """How a run ended: exit code of what was started, what was printed, processes left, last steps logged and saved."""

    code: int
    printed: str
    left: list[int]
    steps: int
    saved: int


def environment_of(project: Path) -> dict[str, str]:
    return os.environ | {
        "VENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "HF_DATASETS_CACHE": str(project / "cache"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RANKS": "2",
    }


def processes_of(run: str, ranks: bool = False) -> list[int]:
    """Processes with the run's folder on their command line; its `ranks` alone, which are the trainers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            zombie = (process / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            continue  # it has ended
        if run in words and not zombie and (not ranks or words[1:4] == ["-u", "-m", "ds_tokimg"]):
            found.append(int(process.name))
    return sorted(found)


def outcome(case: Case, project: Path, seconds: float = 150.0) -> Outcome:
    """Starts a run, sends the signal after three steps, and looks again when all has ended, or after some seconds."""
    run, log = str(case), project / f"{case}.log"
    words = COMMANDS[case.launcher].format(port=free_port()).split()
    words += [*FLAGS.split(), *INTERVALS.split(), "--output_dir", run]
    with open(log, "w") as output:
        started = subprocess.Popen(
            words, cwd=project, env=environment_of(project), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for_steps(project / run, started, log)
        ranks, everyone = processes_of(run, ranks=True), processes_of(run)
        for process in {"launcher": [started.pid], "rank": ranks[-1:], "all": everyone}[case.to]:
            os.kill(process, case.signal)
        end = time.monotonic() + seconds
        while (started.poll() is None or processes_of(run)) and time.monotonic() < end:
            time.sleep(0.2)
        latest = project / run / "checkpoints" / "latest"
        saved = int(latest.read_text().removeprefix("step_")) if latest.is_file() else 0
        steps = metrics(project / run)[-1]["step"]
        return Outcome(started.wait(timeout=5), log.read_text(), processes_of(run), steps, saved)
    finally:
        for process in processes_of(run):
            os.kill(process, signal.SIGKILL)
        started.kill()
        started.wait()


def wait_for_steps(run: Path, started: subprocess.Popen, log: Path, steps: int = 3) -> None:
    """Until so many steps are logged. AssertionError with what was printed where that takes too long."""
    deadline, rows = time.monotonic() + START_SECONDS, run / "metrics.jsonl"
    while not rows.is_file() or rows.read_text().count("\n") < steps:
        assert started.poll() is None, f"it ended with {started.returncode}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no {steps} steps; left: {processes_of(run.name)}:\n{log.read_text()}"
        time.sleep(0.1)
