"""The ranks of a run, and the few collectives that the trainer uses outside of the engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ds_tokimg.engine.watch import GO_ON, LostRank, Progress, Watch
from ds_tokimg.errors import TrainingError, UserError

# Where ranks watch each other, a collective may wait for as long as the others live and work.
WATCHED_TIMEOUT = timedelta(days=2)


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Within: a rank that was killed, failed or hung for longer than the time-out becomes one clear LostRank."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, NCCL a DistError.
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
            raise LostRank(
                "another rank no longer answers: it was killed, failed (see what it printed) or hung. "
                f"{GO_ON}. [{error}]"
            ) from error
        raise


class Dist:
    """The process group, which has been joined.

    `control` is a group for small values that live on the host: gloo, so that agreeing on them never waits for an
    accelerator's queue. `timeout`: of every collective.
    """

    def __init__(self, local_rank: int, device: torch.device, timeout: timedelta):
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.local_rank = local_rank
        self.device, self.timeout = device, timeout
        on_host = torch.distributed.get_backend() == "gloo"
        self.control = torch.distributed.group.WORLD if on_host else torch.distributed.new_group(backend="gloo")
        self.progress = Progress()
        self.watch = Watch(self.rank, self.world_size, self.progress)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """Within: ranks watch each other, see watch.py. Collective. A rank that is lost is named by the LostRank that
        the others raise; those that cannot, because they wait for it, end with exit code 1."""
        self.watch = Watch(self.rank, self.world_size, self.progress)
        if self.all_true(self.watch.connect(self.broadcast)) and "DEEPSPEED_TIMEOUT" not in os.environ:
            self.timeout = WATCHED_TIMEOUT
        self.limit()
        failure = None
        try:
            with answering():
                yield self.watch
        except LostRank:
            if self.watch.explanation():
                raise LostRank(f"{self.watch.lost}. {GO_ON}") from None
            raise
        except BaseException as error:
            known = isinstance(error, TrainingError | UserError)
            failure = str(error) if known else f"{type(error).__name__}: {error}"
            raise
        finally:
            self.watch.close(failure)

    def leave(self) -> None:
        """End the process group. A rank that ends with its threads still running may be aborted, whatever its exit code
        was to be."""
        torch.distributed.destroy_process_group()

    def limit(self) -> None:
        """Gives the time-out to every group that there is by now: those of the engine come with another one."""
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(self.timeout, group)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self._together():
            torch.distributed.barrier(group=self.control)

    def sum(self, values: list[float]) -> list[float]:
        """Sums of `values` over all ranks, in float64; the same list on every rank."""
        return self._reduce(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_ints(self, values: list[int]) -> list[int]:
        """Sums of `values` over all ranks, exact; the same list on every rank."""
        return self._reduce(torch.tensor(values, dtype=torch.int64)).tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum of a host tensor over all ranks, in place."""
        return self._reduce(tensor)

    def all_true(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on every rank."""
        return self.sum_ints([int(flag)])[0] == self.world_size

    def broadcast(self, value):
        """The value of rank 0, any small picklable object."""
        box = [value]
        if self.world_size > 1:
            with self._together():
                torch.distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_first_rank(self, action: Callable):
        """The result of `action()` on rank 0, on every rank; when it raises, every rank raises."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (action(), None)
            except UserError as mistake:
                outcome = (None, mistake)
            except Exception as failure:
                self.broadcast((None, TrainingError(f"rank 0 failed: {failure}")))
                raise
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return value

    def gather(self, value) -> list:
        """The values of all ranks in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        with self._together():
            torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def _reduce(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            with self._together():
                torch.distributed.all_reduce(tensor, group=self.control)
        return tensor

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Within: this rank waits for the others."""
        self.progress.enter()
        try:
            yield
        finally:
            self.progress.leave()


class OnlyRank:
    """Stands for the process group where there is one process and no engine."""

    device = torch.device("cpu")

    def on_first_rank(self, action: Callable):
        return action()
