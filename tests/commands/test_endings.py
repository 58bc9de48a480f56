"""How commands end before they are done: Ctrl-C, a pipe that nobody reads, places that are not there."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_tokimg.__main__ import main
from tests.support.exports import write_export
from tests.support.runs import ROOT, small_flags, write_corpus

COMMANDS = {
    "train": "--data_path corpus.txt",
    "plan": "--data_path corpus.txt",
    "preview": "--data_path corpus.txt",
    "evaluate": "--checkpoint run --data_path corpus.txt",
    "generate": "--checkpoint run",
    "chat": "--checkpoint run",
    "export": "--checkpoint run --output out",
}


ENDED = {"train": "SIGINT: ended. The run had not begun its first step, or was complete: nothing is lost"}


def start(*argv, **options) -> subprocess.Popen:
    """A command in a process of its own, as a shell starts it, in which RANK is not set."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [sys.executable, "-m", "ds_tokimg", *map(str, argv)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **pipes)


def told(process: subprocess.Popen, words: bytes, timeout: float = 300.0) -> bytes:
    """What it writes to stderr up to some words."""
    written, deadline = b"", time.monotonic() + timeout
    while words not in written:
        assert time.monotonic() < deadline, written
        if select.select([process.stderr], [], [], 1.0)[0]:
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, written
            written += piece
    return written


def interrupted(process: subprocess.Popen, words: bytes, code: int = 130) -> tuple[bytes, bytes]:
    """Ctrl-C after some words on stderr -> what it wrote to stdout, and to stderr."""
    try:
        before = told(process, words)
        process.send_signal(signal.SIGINT)
        out, after = process.communicate(timeout=180)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, after
    return out, before + after


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_starts_is_one_line(command, tmp_path):
    (tmp_path / "corpus.txt").write_text("a text\n")
    code = 0 if command == "train" else 130  # a run that is asked to stop ends well
    out, written = interrupted(start(command, *COMMANDS[command].split(), cwd=tmp_path), b"starting", code)
    assert [*written.decode().splitlines(), *out.decode().splitlines()] == [
        "starting …",
        ENDED.get(command, "interrupted"),
    ]


@pytest.mark.slow
def test_ctrl_c_while_it_works_is_one_line(tmp_path):
    export, corpus = write_export(tmp_path / "export"), write_corpus(tmp_path, 3000)
    flags = ["--checkpoint", export, "--data_path", corpus, "--split", "all", "--noise_levels", 5000]
    out, written = interrupted(start("evaluate", *flags, "--cache_dir", tmp_path / "cache"), b"evaluating: ")
    assert out == b"" and b"Traceback" not in written
    assert written.decode().splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"], ["--version"]], ids=" ".join)
def test_a_pipe_that_nobody_reads_is_no_traceback(command):
    read, write = os.pipe()
    os.close(read)
    process = start(*command, stdout=write)
    os.close(write)
    assert process.communicate(timeout=180)[1] == b""
    assert process.returncode in (0, 141)  # argparse ends by itself


def refused(capsys, *argv) -> str:
    assert main([str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("command", ["evaluate", "generate", "plan", "preview"])
def test_a_missing_folder_is_said_before_the_work(command, tmp_path, capsys):
    """Nothing else that these flags name exists either: it is not looked for."""
    place = Path("/no/such/folder/figures.json")
    flags = COMMANDS[command].replace("corpus.txt", str(tmp_path / "none")).split()
    message = refused(capsys, command, *flags, "--json", place)
    assert f"--json {place} cannot be written: there is no folder {place.parent}" in message


@pytest.mark.parametrize("command", ["generate", "preview"])
def test_a_folder_of_images_that_cannot_be_made_is_said_before_the_work(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = COMMANDS[command].replace("corpus.txt", str(tmp_path / "none")).split()
    message = refused(capsys, command, *flags, "--save_images", tmp_path / "file" / "pictures")
    assert (
        f"--save_images {tmp_path / 'file' / 'pictures'} cannot be written: {tmp_path / 'file'} is no folder" in message
    )


def test_a_device_that_is_not_there_is_said(tmp_path, capsys):
    export, corpus = write_export(tmp_path / "export"), write_corpus(tmp_path)
    for command in (["generate"], ["evaluate", "--data_path", corpus]):
        assert "the device 'xpu:7' cannot be used" in refused(
            capsys, *command, "--checkpoint", export, "--device", "xpu:7"
        )


def test_flags_without_an_effect_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    export, corpus = write_export(tmp_path / "export"), write_corpus(tmp_path)
    flags = ["--checkpoint", export, "--data_path", corpus, "--many_steps", "--weights", "trained"]
    assert main([*map(str, ["evaluate", *flags, "--noise_levels", 1])]) == 0
    printed = capsys.readouterr().out
    assert "note: --weights trained has no effect: an export holds one set of weights" in printed
    preview = [*small_flags(corpus, tmp_path / "run"), "--eval_data_path", corpus, "--num_texts", 0]
    assert main([*map(str, ["preview", *preview, "--eval_fraction", 0.1, "--save_images", tmp_path / "images"])]) == 0
    printed = capsys.readouterr().out
    assert "note: --eval_fraction has no effect: --eval_data_path names the validation texts" in printed
    assert "note: --save_images has no effect: --num_texts 0 shows no image" in printed


def test_conditions_without_prompts_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = [*small_flags(write_corpus(tmp_path), tmp_path / "run"), "--enable_condition"]
    assert main(["preview", *map(str, flags)]) == 0
    assert "--enable_condition has no effect: no training text has a prompt" in capsys.readouterr().out
