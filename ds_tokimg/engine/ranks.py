"""The ranks of a run, and the few collectives that the trainer uses outside of the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_tokimg.errors import TrainingError, UserError


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Within: a rank that was killed, failed or hung for longer than the time-out becomes one clear TrainingError."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, NCCL a DistError.
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
            raise TrainingError(
                "another rank no longer answers: it was killed, failed (see what it printed) or hung. Go on from the "
                f"last checkpoint with --resume latest. [{error}]"
            ) from error
        raise


class Dist:
    """The process group, which has been joined.

    `control` is a group for small values that live on the host: gloo, so that agreeing on them never waits for an
    accelerator's queue.
    """

    def __init__(self, local_rank: int, device: torch.device):
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.local_rank = local_rank
        self.device = device
        on_host = torch.distributed.get_backend() == "gloo"
        self.control = torch.distributed.group.WORLD if on_host else torch.distributed.new_group(backend="gloo")

    def leave(self) -> None:
        """End the process group. A rank that ends with its threads still running may be aborted, whatever its exit code
        was to be."""
        torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every rank is here."""
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
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def _reduce(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, group=self.control)
        return tensor


class OnlyRank:
    """Stands for the process group where there is one process and no engine."""

    device = torch.device("cpu")

    def on_first_rank(self, action: Callable):
        return action()
