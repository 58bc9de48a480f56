"""Launch scripts under signals, and the one for Slurm with programs that stand for Slurm's own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import copy_project, metrics, write_corpus

pytestmark = pytest.mark.slow
FLAGS = "--data_path corpus.txt --model JiT-XS/4 --img_size 16 --max_tokens 64 --vocab_size 300 --train_batch_size 8"
INTERVALS = "--log_interval 1 --eval_interval 1000 --save_interval 1000 --num_samples 0 --epochs 100"
# A script imports torch in four processes, one after another, before the first step: 20 s on two idle cores.
START_SECONDS = 400
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


@pytest.fixture(scope="module")
def environment(project) -> dict:
    return os.environ | {
        "VENV": sys.prefix,
        "PATH": f"{project / 'slurm'}:{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "HF_DATASETS_CACHE": str(project / "cache"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def ranks_of(run: str) -> list[int]:
    """Processes that write to a run's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue  # it has ended
        if "ds_tokimg" in words and run in words:
            found.append(int(process.name))
    return found


def stopped(command: str, run: str, project: Path, environment: dict) -> str:
    """Starts a run, sends SIGTERM to its script alone after some steps, and returns what it printed."""
    words = [*command.split(), *FLAGS.split(), *INTERVALS.split(), "--output_dir", run]
    log, rows = project / f"{run}.log", project / run / "metrics.jsonl"
    with open(log, "w") as output:
        script = subprocess.Popen(words, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not rows.is_file() or rows.read_text().count("\n") < 3:
            assert script.poll() is None, f"it ended with {script.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"no three steps yet; {len(ranks_of(run))} ranks:\n{log.read_text()}"
            time.sleep(0.1)
        script.send_signal(signal.SIGTERM)
        script.wait(timeout=60)
        assert ranks_of(run) == []
        return log.read_text()
    finally:
        for process in ranks_of(run):
            os.kill(process, signal.SIGKILL)
        script.kill()
        script.wait()


def assert_saved(run: Path, printed: str) -> None:
    last = metrics(run)[-1]["step"]
    assert f"stopped by a signal at step {last}" in printed, printed
    assert (run / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"


def test_a_signal_to_the_training_script_saves(project, environment):
    printed = stopped("bash launch/train.sh", "term", project, environment | {"RANKS": "2"})
    assert "2 rank(s)" in printed
    assert_saved(project / "term", printed)


def test_slurm_starts_all_nodes_and_its_warning_saves(project, environment):
    slurm = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "1", "MASTER_PORT": "29517"}
    printed = stopped("bash launch/slurm.sbatch", "slurm-run", project, environment | slurm)
    assert "2 rank(s)" in printed
    assert_saved(project / "slurm-run", printed)
