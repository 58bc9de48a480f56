"""A user's mistake that not all ranks can see (a file that one host lacks): told once, and known to all.

A rank that finds one tells the others through the store by which they have met, and leaves; the others notice that it
has, look there, and end alike.
"""

from __future__ import annotations

import socket
import time

import torch

from ds_tokimg.engine.ranks import Dist
from ds_tokimg.errors import UserError

_COUNT, _MESSAGE = "ds_tokimg/mistakes", "ds_tokimg/mistake"
_PATIENCE = 10.0  # seconds that the host of the store gives the other ranks


class Mistakes:
    """Of the ranks of a run."""

    def __init__(self, dist: Dist):
        self.rank, self.world_size = dist.rank, dist.world_size
        self.store = torch.distributed.distributed_c10d._get_default_store()

    def tell(self, mistake: UserError) -> None:
        """Decides whether this rank prints its mistake: the first one does, and who found another."""
        if self.world_size == 1:
            return
        message = str(mistake)
        mistake.is_printed = True
        try:
            if self.store.add(_COUNT, 1) == 1:
                self.store.set(_MESSAGE, message)
            else:
                mistake.is_printed = self.store.get(_MESSAGE).decode() != message
        except RuntimeError:  # the store has gone with its rank, which had its own reasons
            return
        if self.rank and mistake.is_printed:
            mistake.args = (f"{message} [rank {self.rank}, on {socket.gethostname()}]",)

    def found_elsewhere(self) -> bool:
        """Whether another rank has told of a mistake, so that this one ends too."""
        try:
            found = self.world_size > 1 and self.store.check([_MESSAGE])
            if found:
                self.store.add(_COUNT, 1)
        except RuntimeError:
            return False
        return bool(found)

    def wait(self) -> None:
        """The store is on rank 0: it stays until all have looked, or have had time to."""
        end = time.monotonic() + _PATIENCE
        while self.rank == 0 and self.world_size > 1 and time.monotonic() < end:
            if self.store.add(_COUNT, 0) >= self.world_size:
                return
            time.sleep(0.05)
