"""What signals ask of a run: to save and leave.

A handler of Python's runs in the main thread, between two of its instructions: not while that thread waits in a
collective or reads a library from the disk. So a thread hears of each signal too, and acts where the main thread does
not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from ds_tokimg.console import say_from_signal

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import TrainEngine

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal and the launchers below it may each pass on one and the same request: only a later one is a second.
SAME_REQUEST_SECONDS = 2.0
# For the main thread to do what a signal asks, before the thread that hears it does so.
MAIN_THREAD_SECONDS = 1.0

_hears = False  # this process, or the one that it was forked from


class Interrupted(Exception):
    """A signal ended what was done within `StopSignals.interrupting`."""


@contextlib.contextmanager
def hearing(heard: Callable[[int], None]) -> Iterator[None]:
    """Within: a thread calls `heard(number)` for every signal that has a handler. In the main thread."""
    global _hears
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    before, _hears = signal.set_wakeup_fd(sink, warn_on_full_buffer=False), True

    def listen() -> None:
        while number := os.read(source, 1)[0]:
            heard(number)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(sink, b"\0")
        thread.join()
        os.close(sink)
        os.close(source)


def _in_a_child() -> None:
    """Signals of a worker that was forked off (by the tokeniser's pool) are its own, and end it."""
    if _hears:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_a_child)


@contextlib.contextmanager
def before_training() -> Iterator[None]:
    """Within, where there is nothing to save yet: a signal ends the process with exit code 0."""

    def leave(number: int) -> None:
        name = signal.Signals(number).name
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say_from_signal(f"{name}: ended. The run had not begun its first step, or was complete: nothing is lost")
        os._exit(0)

    before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
    try:
        with hearing(leave):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """Within: SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an orderly end; the engine tells the other ranks. A
    second one ends the process at once. The end of the launcher asks for the same."""

    def __init__(self, engine: TrainEngine):
        self.engine = engine
        self._asked_at: float | None = None
        self._heard_at: float | None = None
        self._interrupts = False
        self._before: dict[int, object] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        self._stack.enter_context(hearing(self._hear))
        self.engine.dist.watch.on_orphaned = self._orphaned
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for number, handler in self._before.items():
            # A run that failed is about to say why: what its launcher then sends does not cut it short.
            signal.signal(number, signal.SIG_IGN if any(error) else handler)  # type: ignore[arg-type]
        if self._asked_at is not None and "TORCHELASTIC_RUN_ID" in os.environ and not any(error):
            self._say("what torchrun now prints about the signal is its own end: the run has ended well")

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, where there is nothing left to save: a signal raises Interrupted at once, one that has come already
        on entering."""
        if self.engine.stop_requested:
            raise Interrupted
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        name = signal.Signals(number).name
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self.engine.stop_requested = True
            self._say(f"{name}: the run saves what is not saved yet and ends; a second signal ends it at once")
            if self._interrupts:
                raise Interrupted
        elif time.monotonic() - self._asked_at >= SAME_REQUEST_SECONDS:
            self._say(f"{name} again: ended at once. The last checkpoint is as it was")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _hear(self, number: int) -> None:
        """In a thread: for a main thread that is held up, by another rank or by a long operation."""
        now, name = time.monotonic(), signal.Signals(number).name
        if self._heard_at is None:
            self._heard_at = now
            time.sleep(MAIN_THREAD_SECONDS)
            if self._asked_at is None:
                self.engine.stop_requested = True
                self._say(f"{name}: the run saves and ends once its ranks have come together; a second ends it at once")
        elif now - self._heard_at >= SAME_REQUEST_SECONDS:
            time.sleep(MAIN_THREAD_SECONDS)  # by now the main thread has ended the process, if it can
            self._say(f"{name} again: ended at once. The last checkpoint is as it was")
            os._exit(128 + number)

    def _orphaned(self) -> None:
        """In the watch's thread."""
        self._say("the launcher of this run has ended: the run saves what is not saved yet and ends")
        self.engine.stop_requested = True

    def _say(self, line: str) -> None:
        """On rank 0, past Python's buffers: the signal may have come in the middle of a print."""
        if self.engine.dist.rank == 0:
            say_from_signal(line)
