"""chat: lines in, answers out, and a clean end however it comes."""

import builtins
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from ds_tokimg import load
from ds_tokimg.__main__ import main
from tests.support.exports import write_export
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("answers") / "export", enable_condition=True, block_size=1)


def chat(typed: str | bytes, monkeypatch, *argv) -> int:
    raw = typed.encode() if isinstance(typed, str) else typed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
    return main(["chat", *map(str, argv)])


@pytest.mark.parametrize("end", ["\n\nthe sun?\n", "\n", ""], ids=["empty line", "end of input", "no line break"])
def test_every_line_is_answered_until_the_end(end, answers, monkeypatch, capsys):
    assert chat("the sea?\nthe sea?" + end, monkeypatch, "--checkpoint", answers, "--seed", 4) == 0
    lm = load(answers)
    expected = [lm.answer("the sea?", seed=seed) for seed in (4, 5)]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_the_chat_template_of_the_run_is_used(tmp_path, monkeypatch, capsys):
    folder = write_export(tmp_path / "export", enable_condition=True, use_chat_template=True)
    assert chat("the sea?\n", monkeypatch, "--checkpoint", folder) == 0
    written = capsys.readouterr().out
    lm = load(folder)
    plain = load(write_export(tmp_path / "plain", enable_condition=True))
    assert written == lm.answer("the sea?") + "\n" != plain.answer("the sea?") + "\n"
    assert written == plain.answer("user: the sea?\nassistant: ") + "\n"


@pytest.mark.parametrize(
    ("argv", "typed", "message"),
    [
        ([], b"\xff\xfe\n", "not UTF-8"),
        (["--max_new_tokens", "0"], b"", "--max_new_tokens 0"),
        (["--num_inference_steps", "0"], b"", "steps"),
        (["--device", "gpu9"], b"", "gpu9"),
    ],
)
def test_mistakes(argv, typed, message, answers, monkeypatch, capsys):
    assert chat(typed, monkeypatch, "--checkpoint", answers, *argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed


def test_a_model_without_conditions_is_told_to_generate(tmp_path, monkeypatch, capsys):
    folder = write_export(tmp_path / "export")
    assert chat("the sea?\n", monkeypatch, "--checkpoint", folder) == 2
    printed = capsys.readouterr()
    assert f"generate --checkpoint {folder} --prompt TEXT" in printed.err and not printed.out


def test_ctrl_c_ends_it(answers, monkeypatch, capsys):
    def interrupted(invitation):
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", interrupted)
    assert chat("", monkeypatch, "--checkpoint", answers) == 0


@pytest.mark.parametrize("end", ["\n", "\x04", signal.SIGINT], ids=["empty line", "ctrl-d", "ctrl-c"])
def test_in_a_real_terminal(end, answers):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ds_tokimg", "chat", "--checkpoint", answers, "--device", "cpu"]
    program = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    try:
        shown = read_until(ours, "> ")
        os.write(ours, b"the sea?\n")
        shown += read_until(ours, "> ")
        if isinstance(end, str):
            os.write(ours, end.encode())
        else:
            time.sleep(1)  # Python overhears a signal between its invitation and its waiting for a line
            program.send_signal(end)
        assert program.wait(60) == 0
    finally:
        program.kill()
        os.close(ours)
    assert "an empty one ends" in shown and "Traceback" not in shown


def read_until(terminal: int, text: str, seconds: float = 60) -> str:
    """What a terminal shows until it ends with `text`; fails when nothing comes for so long."""
    shown = ""
    while not shown.endswith(text):
        assert select.select([terminal], [], [], seconds)[0], shown
        shown += os.read(terminal, 4096).decode()
    return shown
