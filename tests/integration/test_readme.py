"""The README's commands and the launch scripts, run as a newcomer would: in a copy of the project."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from ds_tokimg.settings.config import TrainConfig
from tests.support.runs import ROOT, copy_project, metrics

# What makes a training run of the README short; everything else is as written there.
SHORT = "--max_steps 2 --eval_fraction 0.002 --num_samples 1 --train_batch_size 2 --max_tokens 64"
TRAINING = re.compile(r"ds[-_]tokimg train|launch/train\.sh")
# What `pip install` makes of the package's entry point.
PROGRAM = """#!/bin/sh
exec {python} -m ds_tokimg "$@"
"""
# What a run says at its end.
FIGURES = re.compile(r"validation: ([\d.]+) bits per token \(unigram entropy ([\d.]+)\)")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project, in which runs may be written."""
    return copy_project(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory, project) -> dict:
    """The environment of these tests stands for the one that launch/setup.sh makes, with the package installed."""
    program = tmp_path_factory.mktemp("bin") / "ds-tokimg"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return os.environ | {
        "VENV": sys.prefix,
        "PATH": f"{program.parent}:{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
    }


def commands(language: str = "bash") -> list[str]:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line]


def call(command: str, project: Path, environment: dict, timeout: float = 600) -> str:
    done = subprocess.run(
        shlex.split(command), cwd=project, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_names_the_two_commands():
    assert commands()[:2] == ["bash launch/train.sh", "bash launch/test.sh"]


def test_launch_train(project, environment):
    with socket.socket() as another_job:
        with contextlib.suppress(OSError):  # somebody holds the launcher's own port already
            another_job.bind(("", 29500))
            another_job.listen()
        printed = call(f"bash launch/train.sh {SHORT} --output_dir runs/script --model JiT-XS/4", project, environment)
    assert len(metrics(project / "runs" / "script")) == 2
    assert TrainConfig.load(project / "runs" / "script" / "config.json").recipe == "at-once"
    for word in (
        "bits/token",
        "samples:",
        "unigram entropy",
        "4-gram model of",
        "tensorboard --logdir",
        "--resume",
        "generate",
        "scale up",
    ):
        assert word in printed


def test_launch_train_reports_a_mistake_without_traceback(project, environment):
    done = subprocess.run(
        ["bash", "launch/train.sh", "--epochs", "0"], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--epochs 0" in done.stderr and "Traceback" not in done.stderr


def test_launch_scripts_are_valid_bash():
    for script in [*(ROOT / "launch").glob("*.s*"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.slow
def test_every_command_of_the_readme(project, environment):
    for command in commands()[2:]:
        if "launch/tensorboard.sh" in command:
            continue  # a server: below
        if TRAINING.search(command):
            command += f" {SHORT if '--resume' not in command else '--max_steps 3 --num_samples 0'}"
        call(command, project, environment)
    assert (project / "figures.json").is_file() and list((project / "pictures").glob("*.png"))
    code = "\n".join(commands("python"))
    assert call(f"{sys.executable} -c {shlex.quote(code)}", project, environment) == ""


def learns_something(printed: str) -> bool:
    """Whether held-out texts cost fewer bits than their tokens one by one."""
    bits, unigram_entropy = map(float, FIGURES.search(printed).groups())
    return bits < unigram_entropy


@pytest.mark.slow
def test_the_example_of_prompts_and_answers_is_worth_running(project, environment):
    """As written in the README."""
    (command,) = (line for line in commands() if TRAINING.search(line) and "--enable_condition" in line)
    assert learns_something(call(f"{command} --output_dir runs/worth", project, environment, timeout=1200))


@pytest.mark.slow
def test_launch_train_learns_the_bundled_corpus(project, environment):
    """A quarter of the run is enough to be below the unigram entropy."""
    printed = call("bash launch/train.sh --max_steps 250 --output_dir runs/whole", project, environment, timeout=900)
    assert learns_something(printed)
    assert "samples:" in printed and "too few to learn" not in printed


@pytest.mark.slow
def test_tensorboard_script_serves_the_runs_by_their_names(project, environment):
    """Also one that begins later, in any folder; on this machine alone."""

    def write(*run: str) -> None:
        with SummaryWriter(project.joinpath("some runs", *run, "tensorboard")) as writer:
            writer.add_scalar("train/loss", 1.0, 1)

    write("first")
    server = subprocess.Popen(
        ["bash", "launch/tensorboard.sh", "some runs", "--port", "0", "--reload_interval", "1"],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = next(
            (found[0] for line in server.stderr if (found := re.search(r"http://localhost:\d+/", line))), None
        )
        assert address, "TensorBoard ended without serving"
        write("a group", "second")
        deadline = time.monotonic() + 180
        while (runs := shown_runs(address)) != ["a group__second", "first"]:
            assert time.monotonic() < deadline, runs
            time.sleep(0.5)
    finally:
        server.kill()
        server.wait()


def shown_runs(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}data/runs", timeout=120) as answer:
        return sorted(json.loads(answer.read()))
