"""Files that tell of a run: where they cannot be written (disk full, read-only, gone), the run goes on without."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 600.0  # between two lines about the same files: a disk may be full and not full by turns


class LogFiles:
    """What is written `guarded` may fail: that is said once, and the next write tries again.

    Args:
        name: of the files, for the log.
    """

    def __init__(self, name: str):
        self.name = name
        self._failing = False
        self._silent_until = -float("inf")

    @contextlib.contextmanager
    def guarded(self, path: str | Path | None = None) -> Iterator[None]:
        """Within: a failure to write is no failure of the run. A file at `path` is cut back to what it held before."""
        size = _size(path)
        try:
            yield
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)  # type: ignore[arg-type]
            self._say_failure(error)
        else:
            self._say_success()

    def _say_failure(self, error: OSError) -> None:
        if not self._failing and time.monotonic() >= self._silent_until:
            logger.warning(
                "%s cannot be written: %s. The run goes on without, and tries again at every line",
                self.name,
                error.strerror or error,
            )
            self._failing, self._silent_until = True, time.monotonic() + SILENCE_SECONDS

    def _say_success(self) -> None:
        if self._failing:
            logger.warning("%s can be written again; what came in between is missing", self.name)
            self._failing = False


class EventFile:
    """In place of the file below TensorBoard's writer, whose thread would end with the first failure: a record that
    cannot be written is left out."""

    def __init__(self, file: Any, path: str, log_files: LogFiles):
        self._file, self._path, self._log_files = file, path, log_files

    def write(self, record: bytes) -> None:
        with self._log_files.guarded(self._path):
            self._file.write(record)

    def flush(self) -> None:
        with self._log_files.guarded():
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed


def replace_end(path: Path, start: int, old: bytes, new: bytes) -> None:
    """Replace the end of a file from byte `start` on, which is `old`. Where that fails, the file is as it was."""
    try:
        _write_at(path, start, new)
    except OSError:
        with contextlib.suppress(OSError):
            _write_at(path, start, old)
        raise


def _write_at(path: Path, start: int, data: bytes) -> None:
    path.touch()
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)
        file.truncate()


def guard_events(summary_writer: Any) -> None:
    """Guard the events of a torch SummaryWriter, each of which TensorBoard appends to its file as one record."""
    writer = summary_writer.file_writer.event_writer
    records = writer._async_writer._writer
    records._writer = EventFile(records._writer, writer._file_name, LogFiles("the TensorBoard log"))


def _size(path: str | Path | None) -> int | None:
    try:
        return None if path is None else os.stat(path).st_size
    except OSError:
        return 0 if not os.path.exists(path) else None  # type: ignore[arg-type]
