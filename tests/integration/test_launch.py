"""Launch scripts under signals, and the one for Slurm with programs that stand for Slurm's own."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.launches import (
    FLAGS,
    INTERVALS,
    START_SECONDS,
    Case,
    environment_of,
    outcome,
    processes_of,
    wait_for_steps,
)
from tests.support.runs import copy_project, metrics, write_corpus

pytestmark = pytest.mark.slow
# One process a node, all on this machine; signals are handed on, as srun does.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 9
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & done
trap 'kill -TERM $(jobs -p); wait' TERM
wait
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] && printf 'localhost\\nnode2\\n'
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    project = copy_project(tmp_path_factory.mktemp("launch"))
    write_corpus(project)
    for name, script in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (project / "slurm").mkdir(exist_ok=True)
        (project / "slurm" / name).write_text(script)
        (project / "slurm" / name).chmod(0o755)
    return project


def stopped(command: str, run: str, project: Path, environment: dict) -> str:
    """Starts a run, sends SIGTERM to its script alone after some steps, and returns what it printed."""
    words = [*command.split(), *FLAGS.split(), *INTERVALS.split(), "--output_dir", run]
    log = project / f"{run}.log"
    with open(log, "w") as output:
        script = subprocess.Popen(words, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for_steps(project / run, script, log)
        script.send_signal(signal.SIGTERM)
        script.wait(timeout=300)
        assert processes_of(run) == []
        return log.read_text()
    finally:
        for process in processes_of(run):
            os.kill(process, signal.SIGKILL)
        script.kill()
        script.wait()


def assert_saved(run: Path, printed: str) -> None:
    last = metrics(run)[-1]["step"]
    assert f"stopped by a signal at step {last}" in printed, printed
    assert (run / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"


# Cells that differ: who is signalled decides who is left to end the ranks. `all` with SIGINT is Ctrl-C in a terminal.
CASES = [
    Case("train.sh", signal.SIGTERM, "launcher"),
    Case("train.sh", signal.SIGINT, "launcher"),
    Case("train.sh", signal.SIGKILL, "launcher"),
    Case("train.sh", signal.SIGTERM, "rank"),
    Case("deepspeed", signal.SIGTERM, "launcher"),
    Case("deepspeed", signal.SIGINT, "all"),
    Case("deepspeed", signal.SIGKILL, "launcher"),
    Case("deepspeed", signal.SIGKILL, "rank"),
    Case("torchrun", signal.SIGTERM, "launcher"),
    Case("torchrun", signal.SIGINT, "all"),
    Case("torchrun", signal.SIGKILL, "launcher"),
    Case("torchrun", signal.SIGKILL, "rank"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_however_a_run_ends_nothing_is_left_of_it_and_what_can_be_saved_is(case, project):
    """Ranks that nobody sees any more would hold their accelerators."""
    end = outcome(case, project)
    assert end.left == [] and "2 rank(s)" in end.printed, end.printed
    if (case.signal, case.to) == (signal.SIGKILL, "rank"):
        assert end.code != 0 and "is gone, at step" in end.printed, end.printed
    else:
        assert end.saved == end.steps, end.printed
    if case.launcher == "train.sh":
        assert end.code == (-signal.SIGKILL if case.signal == signal.SIGKILL else 0), end.printed
    if case.launcher == "torchrun" and "Traceback" in end.printed and case.signal != signal.SIGKILL:
        announced, its_own = (end.printed.index(words) for words in ("the run has ended well", "Traceback"))
        assert announced < its_own, end.printed


@pytest.mark.parametrize("seconds", [0.0, 0.5, 4.0])
def test_a_signal_to_the_training_script_before_the_first_step_ends_it(seconds, project):
    words = ["bash", "launch/train.sh", *FLAGS.split(), "--output_dir", f"early-{seconds}"]
    script = subprocess.Popen(words, cwd=project, env=environment_of(project), start_new_session=True)
    try:
        time.sleep(seconds)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=240) in (0, -signal.SIGTERM)  # the latter: before its first line
        assert processes_of(f"early-{seconds}") == []
        assert not (project / f"early-{seconds}" / "checkpoints").exists()
    finally:
        for process in processes_of(f"early-{seconds}"):
            os.kill(process, signal.SIGKILL)


def test_the_training_script_starts_again_from_the_newest_checkpoint(project):
    run, log = "restarted", project / "restarted.log"
    words = ["bash", "launch/train.sh", "--max_restarts", "2", *FLAGS.split(), *INTERVALS.split()]
    words += ["--save_interval", "2", "--max_steps", "150", "--output_dir", run]
    with open(log, "w") as output:
        script = subprocess.Popen(
            words, cwd=project, env=environment_of(project), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for_steps(project / run, script, log, 4)
        os.kill(processes_of(run, ranks=True)[-1], signal.SIGKILL)
        assert script.wait(timeout=START_SECONDS) == 0, log.read_text()
        printed = log.read_text()
        assert printed.count("restart 1 of at most 2") == 1 and "resumed restarted/checkpoints" in printed, printed
        assert [row["step"] for row in metrics(project / run)] == list(range(1, 151))
    finally:
        for process in processes_of(run):
            os.kill(process, signal.SIGKILL)
        script.kill()
        script.wait()


def test_slurm_starts_all_nodes_and_its_warning_saves(project):
    environment = environment_of(project)
    environment["PATH"] = f"{project / 'slurm'}:{environment['PATH']}"
    slurm = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "1", "MASTER_PORT": "29517"}
    printed = stopped("bash launch/slurm.sbatch", "slurm-run", project, environment | slurm)
    assert "2 rank(s)" in printed
    assert_saved(project / "slurm-run", printed)
