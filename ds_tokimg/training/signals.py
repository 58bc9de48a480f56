"""What signals ask of a run: to save and leave."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from ds_tokimg.console import say_from_signal

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import TrainEngine

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal and the launchers below it may each pass on one and the same request: only a later one is a second.
SAME_REQUEST_SECONDS = 2.0


class Interrupted(Exception):
    """A signal ended what was done within `StopSignals.interrupting`."""


class StopSignals:
    """Within: SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an orderly end; the engine tells the other ranks. A
    second one ends the process at once."""

    def __init__(self, engine: TrainEngine):
        self.engine = engine
        self._asked_at: float | None = None
        self._interrupts = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, where there is nothing left to save: a signal raises Interrupted at once."""
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
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

    def _say(self, line: str) -> None:
        """On rank 0, past Python's buffers: the signal may have come in the middle of a print."""
        if self.engine.dist.rank == 0:
            say_from_signal(line)
