"""What a person sees while a program works: a bar on a terminal, a plain line now and then elsewhere.

Both go to stderr, so that what a command is for stays alone on stdout, and the first rank alone shows them. Nothing is
silent for longer than QUIET_SECONDS.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

QUIET_SECONDS = 10.0
WIDTH = 80  # columns of a bar, at most
_TICK_SECONDS = 0.5
_FEW = 20  # lines: bars are not so many that some must be hidden
_CLEAR = b"\r\x1b[J"  # from the start of the line to the end of the screen


class Work:
    """A stretch of work that is shown as long as the `with` statement lasts.

    Args:
        what: in the words of "what it is doing"; "" for what is not shown.
        total: parts that it has; 0 where nobody knows.
        at_once: says on a pipe too that it begins.

    left: what is said of the time left; None: what the parts so far have taken says it.
    """

    def __init__(self, what: str, total: int = 0, at_once: bool = False):
        self.what, self.total, self.at_once = what, total, at_once
        self.done, self.left = 0, None  # type: int, str | None
        self._begun, self._ended = time.monotonic(), threading.Event()
        self._bar: Any = None

    def __enter__(self) -> Work:
        self._begun = time.monotonic()
        if not (self.what and speaks()):
            return self
        if self.at_once and not on_terminal():
            _tell(f"{self.what} …")
        with _lock:
            _shown.append(self)
            if self.at_once:
                self._show()
        threading.Thread(target=self._watch, name="console", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        with _lock:
            if self in _shown:
                _shown.remove(self)
            if self._bar is not None:
                self._bar.close()

    def advance(self, parts: int = 1) -> None:
        """So many parts more are done."""
        self.done += parts

    def _watch(self) -> None:
        """In a thread of its own, which draws: work that is over at once is not shown at all."""
        while not self._ended.wait(_TICK_SECONDS):
            with _lock:
                if not self._ended.is_set() and _shown[-1] is self:
                    self._show()

    def _show(self) -> None:
        if on_terminal():
            if self._bar is None:  # a bar without a total has no truth value
                self._bar = _open_bar(self.what, self.total)
            self._bar.n = self.done
            if self.total:
                self._bar.set_postfix_str(self._time())
            else:
                self._bar.set_description_str(self.line())
        elif time.monotonic() - max(_state.said, self._begun) >= QUIET_SECONDS:
            _tell(self.line())

    def line(self) -> str:
        """How far it is, in words."""
        if not self.total:
            return f"{self.what}: {self._time()}"
        return f"{self.what}: {self.done:,} of {self.total:,} ({self.done / self.total:.0%}), {self._time()}"

    def _time(self) -> str:
        if self.left is not None:
            return f"{self.left} left"
        elapsed = time.monotonic() - self._begun
        if self.total and self.done:
            return f"{clock(elapsed / self.done * (self.total - self.done))} left"
        return f"{clock(elapsed)} so far"


class _State:
    """Of the process. said: when something was last said, by the monotonic clock."""

    said = 0.0
    is_starting = False


_state = _State()
_lock = threading.RLock()
_shown: list[Work | None] = []  # the innermost last; None: somebody else has the terminal


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Within: torch is imported and what needs it, which takes seconds and is said before. Where it is there already
    nothing is said. Meanwhile nothing below an error is logged: that a machine has no GPU is no news to its user."""
    if "torch" in sys.modules:
        yield
        return
    _state.is_starting, before = True, logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with Work("starting", at_once=True):
            yield
    finally:
        _state.is_starting = False
        logging.disable(before)


def is_starting() -> bool:
    """Whether nothing has been done yet that an abrupt end could harm."""
    return _state.is_starting


@contextlib.contextmanager
def given_up() -> Iterator[None]:
    """Within: somebody else draws on the terminal or asks there."""
    with _lock:
        for work in _shown:
            if work is not None and work._bar is not None:
                work._bar.clear()
        _shown.append(None)
    try:
        yield
    finally:
        with _lock:
            _shown.remove(None)
            _state.said = time.monotonic()


def say(line: str) -> None:
    """A line on stdout, above the bars. A program whose work is more than its words goes on where nobody listens any
    more (the terminal or the other end of a pipe is closed)."""
    with contextlib.suppress(OSError), _lock, _bars_away():
        print(line, flush=True)
    _state.said = time.monotonic()


def say_from_signal(line: str, stream: int = 1) -> None:
    """A line past Python's buffers: a signal may come in the middle of a print."""
    with contextlib.suppress(OSError):
        clear = _CLEAR if os.isatty(stream) else b""  # of bars, whoever drew them
        os.write(stream, clear + f"{line}\n".encode())


def speaks() -> bool:
    """Whether this process is the first rank, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def on_terminal() -> bool:
    """Whether stderr is a terminal on which lines can be drawn again."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def clock(seconds: float) -> str:
    """1:05 or 2:01:05."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def _open_bar(what: str, total: int) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would do what ours does
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or WIDTH + 1
    scale = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}" if total else "{desc}"
    size = {"ncols": min(WIDTH, columns - 1), "nrows": _FEW}
    return tqdm(total=total or None, desc=what, bar_format=scale, **size, leave=False, file=sys.stderr)


def _bars() -> bool:
    return any(work is not None and work._bar is not None for work in _shown)


def _bars_away() -> contextlib.AbstractContextManager[Any]:
    if not _bars():
        return contextlib.nullcontext()
    from tqdm import tqdm

    return tqdm.external_write_mode(file=sys.stdout)


def _tell(line: str) -> None:
    _state.said = time.monotonic()
    say_from_signal(line, 2)
