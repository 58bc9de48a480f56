"""chat: lines in, answers out, and a clean end however it comes."""

import builtins
import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from ds_tokimg import load
from ds_tokimg.__main__ import main
from ds_tokimg.commands.chat import _Chat, _talk
from ds_tokimg.inference.loading import load_trained
from ds_tokimg.inference.options import SamplingOptions
from ds_tokimg.inference.texts import TextStream, generate
from tests.support.exports import write_export
from tests.support.runs import ROOT

QUICK = ("--num_inference_steps", 2)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("answers") / "export", enable_condition=True, block_size=1)


def chat(typed: str | bytes, monkeypatch, *argv) -> int:
    raw = typed.encode() if isinstance(typed, str) else typed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
    return main(["chat", *map(str, argv)])


@pytest.mark.parametrize("end", ["\n\nthe sun?\n", "\n", ""], ids=["empty line", "end of input", "no line break"])
def test_every_line_is_answered_until_the_end(end, answers, monkeypatch, capsys):
    assert chat("the sea?\nthe sea?" + end, monkeypatch, "--checkpoint", answers, "--seed", 4, *QUICK) == 0
    lm = load(answers)
    expected = [lm.answer("the sea?", seed=seed, num_inference_steps=2) for seed in (4, 5)]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_the_chat_template_of_the_run_is_used(tmp_path, monkeypatch, capsys):
    folder = write_export(tmp_path / "export", enable_condition=True, use_chat_template=True)
    assert chat("the sea?\n", monkeypatch, "--checkpoint", folder, *QUICK) == 0
    written = capsys.readouterr().out
    lm = load(folder)
    plain = load(write_export(tmp_path / "plain", enable_condition=True))
    quick = {"num_inference_steps": 2}
    assert written == lm.answer("the sea?", **quick) + "\n" != plain.answer("the sea?", **quick) + "\n"
    assert written == plain.answer("user: the sea?\nassistant: ", **quick) + "\n"


@pytest.mark.parametrize(
    ("argv", "typed", "message"),
    [
        ([], b"\xff\xfe\n", "not UTF-8"),
        (["--max_new_tokens", "0"], b"", "--max_new_tokens is 0"),
        (["--num_inference_steps", "0"], b"", "--num_inference_steps is 0"),
        (["--temperature", "-1"], b"", "--temperature is -1.0"),
        (["--top_p", "2"], b"", "--top_p is 2.0"),
        (["--top_k", "0"], b"", "--top_k is 0"),
        (["--stop", ""], b"", "--stop: is empty"),
        (["--max_new_tokens", "999"], b"the sea?\n", "an answer has one image"),
        (["--device", "gpu9"], b"", "gpu9"),
    ],
)
def test_mistakes(argv, typed, message, answers, monkeypatch, capsys):
    assert chat(typed, monkeypatch, "--checkpoint", answers, *argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    shape = {"enable_condition": True, "use_chat_template": True, "block_size": 1}
    return write_export(tmp_path_factory.mktemp("talks") / "export", **shape)


def conversation(lm, *lines: str, seed: int = 0) -> list[str]:
    """The answers to lines, each after the whole conversation before it in the template of the tests, spelt by hand."""
    before, answers = "", []
    for number, line in enumerate(lines):
        before += f"user: {line}\nassistant: "
        # Without the template, the model is shown the text as it stands here.
        shown = load_trained(str(lm))
        shown.format = dataclasses.replace(shown.format, use_chat_template=False)
        text = generate(shown, [before], SamplingOptions(seed=seed + number, max_new_tokens=3))[0]["text"]
        answers.append(text)
        before = before.removesuffix("assistant: ") + f"assistant: {text}\n"
    return answers


def test_a_model_of_conversations_is_shown_the_whole_one(talks, monkeypatch, capsys):
    short = ["--checkpoint", talks, "--max_new_tokens", 3]
    assert chat("a?\nb?\n", monkeypatch, *short) == 0
    expected = conversation(talks, "a?", "b?")
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)
    assert chat("a?\nb?\n", monkeypatch, *short, "--no_history") == 0
    alone = [conversation(talks, "a?")[0], conversation(talks, "b?", seed=1)[0]]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in alone)
    assert alone[1] != expected[1]


def test_commands(talks, monkeypatch, capsys):
    lines = ["a?", "/reset", "b?", "/retry", "//b", "/help", "/nonsense", "/quit", "never asked"]
    assert chat("\n".join(lines), monkeypatch, "--checkpoint", talks, "--max_new_tokens", 3) == 0
    printed = capsys.readouterr()
    answers = [conversation(talks, "a?")[0], *(conversation(talks, "b?", seed=seed)[0] for seed in (1, 2))]
    assert printed.out.startswith("".join(f"{answer}\n" for answer in answers))
    assert "never asked" not in printed.out and "forgotten" in printed.err
    assert printed.err.count("/reset   forget") == 1
    assert "unknown command /nonsense; /help lists those that there are" in printed.err
    assert chat("/rest\n", monkeypatch, "--checkpoint", talks) == 0
    assert "unknown command /rest; did you mean '/reset'?" in capsys.readouterr().err
    assert chat("/retry\n", monkeypatch, "--checkpoint", talks) == 0
    assert "nothing to answer again" in capsys.readouterr().err


def test_a_conversation_that_is_too_long_loses_its_oldest_pairs(talks, monkeypatch, capsys):
    line = "the old house by the sea where it slept all day?"
    assert chat(f"{line}\n" * 3, monkeypatch, "--checkpoint", talks, *QUICK) == 0
    said = capsys.readouterr().err
    assert "the conversation is longer than 64 tokens: its oldest" in said and "are seen" not in said


def test_draws_and_stops(answers, monkeypatch, capsys):
    flags = ["--temperature", "0.5", "--top_k", "9", "--top_p", "0.9", *QUICK]
    assert chat("the sea?\n", monkeypatch, "--checkpoint", answers, *flags) == 0
    written = capsys.readouterr().out.removesuffix("\n")
    assert written == load(answers).answer("the sea?", temperature=0.5, top_k=9, top_p=0.9, num_inference_steps=2)
    stop = re.findall("[ -~]{2}", written)[1]
    assert chat("the sea?\n", monkeypatch, "--checkpoint", answers, *flags, "--stop", stop) == 0
    assert capsys.readouterr().out == written[: written.index(stop)] + "\n"


def test_ctrl_c_in_an_answer(talks, monkeypatch, capsys):
    """It ends a chat from a pipe, and at a terminal the answer alone, which is then not remembered."""
    pieces = TextStream.__iter__
    calls = []

    def interrupted(stream):
        calls.append(stream)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return pieces(stream)

    monkeypatch.setattr(TextStream, "__iter__", interrupted)
    assert chat("a?\nb?\n", monkeypatch, "--checkpoint", talks) == 0
    assert capsys.readouterr().out == "\n" and len(calls) == 1
    calls.clear()
    trained = load_trained(str(talks))
    talk = _Chat(trained, SamplingOptions(), remembers=True)
    monkeypatch.setattr("ds_tokimg.commands.chat._lines", lambda invitation: iter(["a?", "b?"]))
    _talk(talk, at_terminal=True)
    assert [role for role, _ in talk.messages] == ["user", "assistant"] and talk.messages[0][1] == "b?"


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
    words = ["chat", "--checkpoint", answers, "--device", "cpu", *map(str, QUICK)]
    command = [sys.executable, "-m", "ds_tokimg", *words]
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
        assert program.wait(180) == 0
    finally:
        program.kill()
        os.close(ours)
    assert "an empty one ends" in shown and "Traceback" not in shown


def read_until(terminal: int, text: str, seconds: float = 180) -> str:
    """What a terminal shows until it ends with `text`; fails when nothing comes for so long."""
    shown = ""
    while not shown.endswith(text):
        assert select.select([terminal], [], [], seconds)[0], shown
        shown += os.read(terminal, 4096).decode()
    return shown
