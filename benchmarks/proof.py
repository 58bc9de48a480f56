"""Proof that a change of structure changed no result: two runs, one before it and one after, are the same to the bit.

    python -m benchmarks.proof runs/before runs/after [--renamed]

Compared are the rows of metrics.jsonl, without what a clock decides, and all weights of the last checkpoints, trained
and averaged. Both runs must have been made on the same machine with the same flags and seed, on a CPU with one thread
(`OMP_NUM_THREADS=1`). `--renamed`: parameters may have other names, their values count. Exit code 0 and one line where
the runs are the same; 1 and a list of what differs otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from safetensors.numpy import load_file

# Parts of the names of metrics that depend on how fast the machine was.
CLOCK = ("second", "data_wait", "flops", "peak")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="--output_dir of a run")
    parser.add_argument("after", type=Path, help="--output_dir of the other")
    parser.add_argument("--renamed", action="store_true", help="compare weights by value, whatever their names")
    args = parser.parse_args(argv)
    for run in (args.before, args.after):
        if not (run / "metrics.jsonl").is_file() or not checkpoints(run):
            parser.error(f"{run} is no run with metrics.jsonl and a checkpoint")
    rows, files = read_metrics(args.before), weight_files(args.before)
    found = [*metric_differences(rows, read_metrics(args.after))]
    found += weight_differences(files, weight_files(args.after), args.renamed)
    print("\n".join(found) or f"the same: {len(rows)} rows of metrics, {', '.join(files)} at step {rows[-1]['step']}")
    return 1 if found else 0


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl without what a clock decides."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if not any(word in key for word in CLOCK)} for row in rows]


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, the last one last."""
    return sorted((run / "checkpoints").glob("step_*"))


def weight_files(run: Path) -> dict[str, Path]:
    """The files of weights in a run's last checkpoint by name."""
    return {file.name: file for file in sorted(checkpoints(run)[-1].glob("*.safetensors"))}


def metric_differences(before: list[dict], after: list[dict]) -> Iterator[str]:
    """What differs, one line for each value."""
    if len(before) != len(after):
        yield f"metrics.jsonl: {len(before)} rows before, {len(after)} after"
    for old, new in zip(before, after, strict=False):
        for key in [*old, *(key for key in new if key not in old)]:
            # As JSON, so that NaN equals NaN.
            was, now = (json.dumps(row[key]) if key in row else "missing" for row in (old, new))
            if was != now:
                yield f"metrics.jsonl, step {old.get('step')}, {key}: {was} before, {now} after"


def weight_differences(before: dict[str, Path], after: dict[str, Path], renamed: bool = False) -> Iterator[str]:
    """What differs in files of weights, one line for each parameter."""
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            yield f"{name}: only {'before' if name in before else 'after'}"
        elif renamed:
            lost = Counter(parameters(before[name]).values()) - Counter(parameters(after[name]).values())
            if lost or len(parameters(before[name])) != len(parameters(after[name])):
                yield f"{name}: {lost.total()} parameters of before have no equal after"
        else:
            yield from _named_differences(name, parameters(before[name]), parameters(after[name]))


def _named_differences(file: str, before: dict[str, tuple], after: dict[str, tuple]) -> Iterator[str]:
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            yield f"{file}, {name}: only {'before' if name in before else 'after'}"
        elif before[name] != after[name]:
            yield f"{file}, {name}: not the same bits"


def parameters(file: Path) -> dict[str, tuple]:
    """(type, shape, bytes) of each parameter: what must be equal, and can be counted."""
    return {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in load_file(file).items()}


if __name__ == "__main__":
    sys.exit(main())
