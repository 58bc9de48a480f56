"""What the benchmarks share: rivals that take turns, medians with their spread, and the tables they are printed in."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def take_turns(
    rivals: Mapping[Name, Callable[[], object]], repetitions: int, warm_up: int = 1, clock=time.perf_counter
) -> dict[Name, list[float]]:
    """Seconds of each call: every rival once, then every rival again, so that a busy moment hits all of them.

    The first `warm_up` rounds are not counted.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in rivals}
    for turn in range(warm_up + repetitions):
        for name, rival in rivals.items():
            begun = clock()
            rival()
            if turn >= warm_up:
                seconds[name].append(clock() - begun)
    return seconds


def ratios(above: list[float], below: list[float]) -> list[float]:
    """The quotient of each turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median, lowest and highest: "1.02 (0.99 to 1.05)"."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_title(title: str) -> None:
    """The page's head: what was run, when, on what."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
    cores = len(os.sched_getaffinity(0))
    print(f"# {title}\n\n`{command}`, {date.today()}, {cores} core(s) of {processor()}{_torch()}.\n", flush=True)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.machine()
    return name + "".join(f" {word}" for word in ("avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if word in flags)


def _torch() -> str:
    torch = sys.modules.get("torch")
    return f", torch {torch.__version__} with {torch.get_num_threads()} thread(s)" if torch else ""


def print_table(*head: str) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)


def print_row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
