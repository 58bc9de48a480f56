"""--profile N: a torch profiler trace of N steps, and the operators that took most of the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_tokimg.console import say

WARM_UP_STEPS = 2


@contextlib.contextmanager
def profiled(steps: int, output_dir: str, dist) -> Iterator[Callable[[], None]]:
    """Profiles `steps` optimiser steps after two of warm-up, on rank 0; yields what is to be called after each step.

    Writes OUTPUT/profile/trace.json (for chrome://tracing or Perfetto) and prints the top operators. With `steps` 0
    nothing is done, and nothing imported.
    """
    if not steps or dist.rank != 0:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    folder = Path(output_dir) / "profile"

    def write(profiler) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        order = "self_cpu_time_total" if dist.device.type == "cpu" else "self_device_time_total"
        say(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))
        say(f"profile of {steps} steps: {folder / 'trace.json'}")

    plan = schedule(wait=0, warmup=WARM_UP_STEPS, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
