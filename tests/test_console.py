"""Bars on a terminal, plain lines elsewhere, and who speaks."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap

import pytest

from ds_tokimg import console

# Nested work with lines between, in a second: drawn twenty times a second, and silence is broken after a fifth of one.
SCRIPT = """
import time
from ds_tokimg import console
console._TICK_SECONDS, console.QUIET_SECONDS = 0.05, 0.2
with console.starting():
    time.sleep(0.2)
with console.Work("training", 4) as training:
    for step in range(1, 5):
        time.sleep(0.1)
        training.advance()
        training.left = "0:09"
        console.say(f"step {step}")
    with console.Work("validating", 2) as validating:
        time.sleep(0.15)
        validating.advance()
        time.sleep(0.3)
    with console.given_up():
        print("drawn by somebody else")
        time.sleep(0.3)
    with console.Work("saving"):
        time.sleep(0.15)
console.say("the end")
"""


def on_a_terminal(script: str, columns: int = 100) -> str:
    """What a script writes to its terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", script])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        written += piece
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, written.decode()
    return written.decode()


def screen(written: str) -> list[str]:
    """What a terminal shows in the end: carriage returns, line feeds and the cursor going up are followed."""
    rows, y, x = [""], 0, 0
    for piece in written.replace("\x1b[A", "\v"):
        if piece == "\r":
            x = 0
        elif piece == "\v":
            y = max(0, y - 1)
        elif piece == "\n":
            y += 1
            rows += [""] * (y == len(rows))
        else:
            rows[y] = rows[y].ljust(x)[:x] + piece + rows[y][x + 1 :]
            x += 1
    return [row.rstrip() for row in rows]


def plainly(script: str, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_terminal_has_bars_and_is_clean_in_the_end():
    written = on_a_terminal(SCRIPT)
    for seen in (
        "starting: 0:00 so far",
        "training  50%|",
        "| 2/4, 0:09 left",
        "validating  50%|",
        "saving: 0:00 so far",
    ):
        assert seen in written
    lines = [f"step {step}" for step in range(1, 5)]
    assert screen(written) == [*lines, "drawn by somebody else", "the end", ""]
    bars = [bar for bar in written.replace("\n", "\r").split("\r") if "|" in bar]
    assert bars and max(len(bar.replace("\x1b[A", "")) for bar in bars) <= 80


def test_bars_fit_a_narrow_terminal():
    script = "import time; time.sleep(0.2)" + SCRIPT  # its size is set meanwhile
    bars = [bar for bar in on_a_terminal(script, 40).replace("\n", "\r").split("\r") if "|" in bar]
    assert bars and max(len(bar.replace("\x1b[A", "")) for bar in bars) < 40


def test_elsewhere_a_plain_line_breaks_a_long_silence():
    done = plainly(SCRIPT)
    assert done.stdout.splitlines() == [*(f"step {step}" for step in range(1, 5)), "drawn by somebody else", "the end"]
    first, *others = done.stderr.splitlines()
    assert first == "starting …" and "\r" not in done.stderr
    assert "validating: 1 of 2 (50%), 0:00 left" in others  # the inner work speaks, and saving was over too soon
    assert not any("training" in line or "saving" in line for line in others)


def test_the_first_rank_alone_speaks():
    assert plainly(SCRIPT, RANK="1").stderr == ""


def test_work_goes_on_where_nobody_listens():
    script = SCRIPT + "\nimport os\nos.write(2, b'done')"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as broken:
        command = [sys.executable, "-c", script.replace('print("drawn by somebody else")', "pass")]
        done = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, timeout=180)
    assert done.stderr.startswith("starting …") and "done" in done.stderr and "Traceback" not in done.stderr


def test_what_is_over_at_once_is_not_shown():
    script = textwrap.dedent("""
        from ds_tokimg import console
        for _ in range(50):
            with console.Work("quick", 3):
                pass
    """)
    assert on_a_terminal(script) == ""


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (65, "1:05"), (7265, "2:01:05"), (360_000, "100:00:00")])
def test_clock(seconds, shown):
    assert console.clock(seconds) == shown
