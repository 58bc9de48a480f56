"""Is the trainer right, and fast, on this machine's accelerators? What only a machine that has some can tell.

    bash launch/gpu.sh [--parts PART ...] [--output FILE] [--dry]

Every figure comes from a process of its own; one that fails leaves its last words in the table, the rest goes on. The
page is printed and written as it grows. About 15 minutes on one GPU. `--dry` runs all of it small, on a CPU too, where
the accelerator's part is played by the CPU.

Parts: `losses` (every ZeRO stage and precision against the CPU), `runs` (resuming, evaluating and writing, here, on the
CPU, and from one to the other), `ranks` (one and all devices of this machine), `waits`, `speed`, `kernels`, `data`,
`overhead`, `precision`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu.check import Check
from benchmarks.gpu.fast import count_waits, measure_data, measure_speed, other_script, show_kernels
from benchmarks.gpu.right import compare_losses, compare_ranks, compare_runs

PARTS = {
    "losses": compare_losses,
    "runs": compare_runs,
    "ranks": compare_ranks,
    "waits": count_waits,
    "speed": measure_speed,
    "kernels": show_kernels,
    "data": measure_data,
    "overhead": other_script("overhead", "--model", "JiT-B/4", "--batch", "16", "--tokens", "4096"),
    "precision": other_script("precision", "--model", "JiT-B/4", "--images", "32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bash launch/gpu.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
    parser.add_argument("--dry", action="store_true", help="small sizes, to see that everything runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ds_tokimg_gpu.") as folder:
        check = Check(args.output, Path(folder), args.dry)
        check.head(args.parts)
        for part in args.parts:
            PARTS[part](check)
        check.say(f"\n{check.failures} failure(s).")
    print(f"written to {args.output}")
    sys.exit(1 if check.failures else 0)


if __name__ == "__main__":
    main()
