"""Writing together: a rank that cannot write stays in step with the others, and all of them learn of it."""

from __future__ import annotations

import contextlib
import errno
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ds_tokimg.engine.ranks import Dist
from ds_tokimg.errors import TrainingError

_FAILURES = (OSError, SafetensorError, RuntimeError)  # torch.save raises RuntimeError for a full disk
_PROBE_BYTES = 2**20


class CannotWrite(TrainingError):
    """A checkpoint could not be written. The earlier ones are as they were."""


class Saving:
    """The files of one checkpoint, written by all ranks into a run's folder.

    Every rank comes to the same collectives, whatever fails on it, and all raise the same CannotWrite.
    """

    def __init__(self, output_dir: Path, dist: Dist):
        self.output_dir, self.dist = output_dir, dist
        self._problem: str | None = None

    def on_first_rank(self, write: Callable[[], Any]) -> Any:
        """The result of `write()` on rank 0, on every rank."""
        return self.on_each_rank(write if self.dist.rank == 0 else lambda: None)[0]

    def on_each_rank(self, write: Callable[[], Any]) -> list:
        """The results of `write()` on all ranks, in their order."""
        result = self.later(write)()
        self.agree()
        return self.dist.gather(result)

    def later(self, write: Callable) -> Callable:
        """`write`, but a failure is raised by the next `agree`; until then this rank writes no more."""

        @functools.wraps(write)
        def attempt(*args, **options):
            if self._problem is not None:
                return None
            try:
                return write(*args, **options)
            except _FAILURES as error:
                self._problem = cause(error, self.output_dir)
                return None

        return attempt

    def agree(self) -> None:
        """Raise CannotWrite on all ranks where any of them has failed to write. Collective."""
        problems = self.dist.gather(self._problem)
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if failed:
            ranks = f" (rank {failed[0]})" if self.dist.world_size > 1 else ""
            raise CannotWrite(
                f"cannot write into {self.output_dir}{ranks}: {problems[failed[0]]}; the earlier checkpoints are as "
                "they were"
            )

    @contextlib.contextmanager
    def undone_by(self, folder: Path) -> Iterator[None]:
        """Within: where writing fails, rank 0 removes the `folder` that is unfinished; it would keep a disk full."""
        try:
            yield
        except CannotWrite:
            if self.dist.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            self.dist.barrier()
            raise


def cause(error: Exception, place: Path) -> str:
    """Why a file in or below the folder `place` could not be written, in words."""
    if not place.exists():
        return f"{place} is gone"
    told = (
        error if isinstance(error, OSError) and error.errno else _probe(place)
    )  # torch and safetensors tell no number
    if told is None:
        return str(error).partition("\n")[0]
    if told.errno != errno.ENOSPC:
        return told.strerror or str(told)
    usage = shutil.disk_usage(place)
    return f"the disk is full ({usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB are free)"


def _probe(place: Path) -> OSError | None:
    """What the operating system says to a small file there."""
    path = place / ".probe"
    try:
        path.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return None
