"""One writer, one folder: while a run writes into its folder, no other does.

    OUTPUT/run.lock    {"host": …, "pid": …, "began": seconds since 1970, "beats": true} of the run that is writing

The process also holds the operating system's lock on this file (POSIX, which goes with the process however it ends and
is not passed on to its children), so two that start at once cannot both find the folder free, and what a killed process
left behind is known to be stale. Another host does not see that lock on every file system: for it the owner renews the
file's time, and one that has not for minutes is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.engine.checkpoint import remove_unfinished
from ds_tokimg.engine.watch import report
from ds_tokimg.errors import UserError

if TYPE_CHECKING:
    from ds_tokimg.engine.ranks import Dist

logger = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT_SECONDS = 20.0  # between two signs of life
SILENT_SECONDS = 180.0  # after which a writer on another host is gone
_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def only_writer(output_dir: str, dist: Dist) -> Iterator[Lock]:
    """Within: rank 0 owns the folder, one that does not exist yet from when it takes the lock. Raises UserError on all
    ranks, and leaves everything as it was, where another run does."""
    lock = Lock(Path(output_dir))
    dist.watch.each_beat.append(lock.beat)
    dist.on_first_rank(lambda: lock.take() if lock.folder.exists() else None)
    try:
        yield lock
    finally:
        lock.release()


class Lock:
    """The lock of a run's folder."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        self._descriptor: int | None = None
        self._own: dict = {}
        self._beat_at = 0.0
        self._made: list[Path] = []  # folders, the innermost first

    def take(self) -> None:
        """Own the folder, which is made if need be. UserError where another process does, or where it cannot be
        written. Nothing happens where it is owned already."""
        if self._descriptor is not None:
            return
        self._made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()
            remove_unfinished(self.folder)  # it may have filled the disk
            self._sign(self._descriptor)
        except OSError as error:
            self.release()
            self._remove_made()
            raise UserError(f"--output_dir {self.folder} cannot be written: {error.strerror}") from None

    def _sign(self, descriptor: int) -> None:
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "began": time.time(), "beats": True}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(self._own) + "\n").encode(), 0)
        os.fsync(descriptor)
        self._beat_at = time.monotonic()

    def beat(self) -> None:
        """Shows now and then that the owner lives. Ends the process where another one has taken over meanwhile, because
        this one was stopped for long: two must not write."""
        descriptor = self._descriptor
        if descriptor is None or time.monotonic() - self._beat_at < BEAT_SECONDS:
            return
        self._beat_at = time.monotonic()
        owner = _read(descriptor)
        if owner and owner != self._own:
            report(f"error: {owner.get('host')} took {self.folder} over while this process was silent: it ends here")
            os._exit(1)
        os.utime(descriptor)

    def release(self) -> None:
        """Give the folder back. Nothing happens where it was not taken."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
            self.path.unlink()
        descriptor, self._descriptor = self._descriptor, None
        os.close(descriptor)
        self._remove_made()

    def _remove_made(self) -> None:
        for place in self._made:
            with contextlib.suppress(OSError):  # what is not empty stays
                place.rmdir()

    def _open(self) -> int:
        """The lock's file, locked and free to be written."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                held = not _locked(descriptor)
                owner = _read(descriptor)
                elsewhere = owner.get("host", socket.gethostname()) != socket.gethostname()
                if held or (elsewhere and not self._is_silent(descriptor, owner)):
                    raise UserError(self._refusal(owner, held))
                if _is(descriptor, self.path):
                    if owner:
                        left = f"process {owner.get('pid')}" + (f" on {owner['host']}" if elsewhere else "")
                        logger.info("taking over %s: %s, which left it, is gone", self.path, left)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has just ended and removed it

    def _is_silent(self, descriptor: int, owner: dict) -> bool:
        """Whether a writer on another host is gone: waits until it shows that it lives, or has been silent for long."""
        last, told = os.fstat(descriptor).st_mtime, False
        while owner.get("beats") and os.fstat(descriptor).st_mtime == last:
            left = SILENT_SECONDS - (self._time_of_disk() - last)
            if left < 0:
                return True
            if not told:
                words = "%s is of a process on %s: waiting up to %.0f s for a sign of life"
                logger.info(words, self.path, owner["host"], left)
            told = True
            time.sleep(min(left + 0.1, BEAT_SECONDS / 4))
        return False

    def _time_of_disk(self) -> float:
        """Seconds since 1970 by the clock that sets the times of this folder's files: that of its server."""
        probe = self.path.with_name(f".{LOCK}.{socket.gethostname()}.{os.getpid()}")
        probe.write_bytes(b"\n")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _refusal(self, owner: dict, held: bool) -> str:
        began = owner.get("began")
        age = f" since {_duration(time.time() - began)}" if isinstance(began, int | float) else ""
        who = f"process {owner.get('pid', 'of unknown number')} on {owner.get('host', 'this host')}"
        refusal = f"--output_dir {self.folder} is in use: {who} has been writing a run into it{age}. "
        if held or owner.get("beats"):
            return refusal + "Wait until it has ended, or choose another folder"
        return refusal + f"If that process is gone, remove the lock that it left: rm {shlex.quote(str(self.path))}"


def _locked(descriptor: int) -> bool:
    """Take the operating system's lock; False where another process has it. A file system without locks has none."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD
    return True


def _read(descriptor: int) -> dict:
    """What stands in the lock; nothing, if its owner has not written it yet or was killed before."""
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _duration(seconds: float) -> str:
    """As a user would say it: `3 hours`."""
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0, seconds):.0f} seconds"
