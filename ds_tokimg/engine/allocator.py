"""Memory of a training step: on a CPU kept for the next step instead of handed back to the kernel; and its peak."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# mallopt's names (malloc.h of glibc), and what they are set to.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER, _GROWTH = 2**31 - 1, 64 << 20


def keep_freed_memory() -> bool:
    """Large blocks come from the heap and stay there when they are freed; False where there is no glibc.

    By default glibc maps every large tensor anew and unmaps it when it is freed, and the kernel clears its pages one
    fault at a time: a quarter of a training step of a small model. Resident memory stays at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False  # another C library
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROWTH))
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on an accelerator took at once so far; on a CPU, the most that the process had in
    memory."""
    if device.type != "cpu":
        import torch

        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
