"""A long run of small steps that saves and validates all the time: does anything grow?

    python -m benchmarks.soak [--steps 2000] > benchmarks/results/soak.md

The trainer is a process of its own with a model of a few thousand parameters. Whenever it has saved, its resident
memory, open file handles, threads and the size of its checkpoints are read from outside, from /proc and the disk.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import ROOT
from benchmarks.timing import print_row, print_table, print_title

# A shape for quick steps, in the name of the smallest model.
TRAIN = (
    "import sys; from ds_tokimg.__main__ import main; from ds_tokimg.model import config; "
    "config.SIZES['XS'] = (2, 32, 2); sys.exit(main(['train', *sys.argv[1:]]))"
)
FLAGS = "--model JiT-XS/4 --img_size 16 --max_tokens 64 --vocab_size 300 --train_batch_size 8 --seed 1 --lr 1e-3"
KEEP = 3


@dataclass(frozen=True)
class Sample:
    """A process after it has saved: MiB of resident memory, numbers of handles and threads, MiB of checkpoints."""

    step: int
    resident: float
    handles: int
    threads: int
    disk: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", type=Path, default=ROOT / "data" / "definitions.jsonl")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save_interval", type=int, default=20)
    parser.add_argument("--eval_interval", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder) / "run"
        samples = list(soak(args.data_path, output_dir, args.steps, args.save_interval, args.eval_interval))
        kept = checkpoints_of(output_dir)
    print_title("Soak")
    validations = args.steps // args.eval_interval
    print(f"{args.steps:,} small steps, {len(samples)} saves, {validations} validations. Medians of the saves.\n")
    print_table("steps", "resident MiB", "file handles", "threads", "MiB of checkpoints")
    for part in tenths(samples):
        span = f"{part[0].step:,} to {part[-1].step:,}"
        print_row(span, f"{of(part, 'resident'):.1f}", *(f"{of(part, name):g}" for name in ("handles", "threads")),
                  f"{of(part, 'disk'):.2f}")  # fmt: skip
    print(f"\nCheckpoints at the end, `--keep_checkpoints {KEEP}`: {', '.join(kept)}.")


def soak(data_path: Path, output_dir: Path, steps: int, save_interval: int, eval_interval: int) -> Iterator[Sample]:
    """A sample after each save of a run. SystemExit when the run fails."""
    flags = [*FLAGS.split(), "--data_path", data_path, "--output_dir", output_dir, "--max_steps", steps]
    flags += ["--cache_dir", output_dir.with_name("cache")]
    flags += ["--epochs", steps, "--num_samples", 0, "--keep_checkpoints", KEEP, "--log_interval", save_interval]
    flags += ["--save_interval", save_interval, "--eval_interval", eval_interval]
    command = [sys.executable, "-u", "-c", TRAIN, *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout  # a pipe, as asked for
        for line in process.stdout:
            saved = re.match(r"saved .*step_0*(\d+)", line)
            if saved:
                yield sample(process.pid, int(saved[1]), output_dir)
    if process.returncode:
        raise SystemExit(f"the run failed with exit code {process.returncode}")


def sample(pid: int, step: int, output_dir: Path) -> Sample:
    """Of a process that has just saved. It goes on meanwhile."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    size = sum(size_of(path) for path in (output_dir / "checkpoints").rglob("*"))
    handles = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(step, int(status["VmRSS"].split()[0]) / 2**10, handles, int(status["Threads"]), size / 2**20)


def size_of(path: Path) -> int:
    """Bytes of a file; 0 for one that has gone meanwhile, and for a folder."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def checkpoints_of(output_dir: Path) -> list[str]:
    """All that lies in a run's folder of checkpoints."""
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def tenths(samples: list[Sample]) -> list[list[Sample]]:
    """Ten parts of equal size, or one of each sample where there are fewer."""
    count = min(10, len(samples))
    cuts = [len(samples) * part // count for part in range(count + 1)]
    return [samples[start:stop] for start, stop in itertools.pairwise(cuts)]


def of(samples: list[Sample], name: str) -> float:
    """The median of one of the numbers."""
    return median(getattr(each, name) for each in samples)


if __name__ == "__main__":
    main()
