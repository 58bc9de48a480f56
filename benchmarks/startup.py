"""From the start of the process to the first optimiser step, against importing the libraries alone.

    python -m benchmarks.startup [--data_path FILE] > benchmarks/results/startup.md

Each rival is a process of its own; they take turns. `first start`: no cache, the tokenizer is trained and the corpus
tokenised. `second start`: another run on the same data. `resumed`: that run goes on. The clock stops at the log line
of the first step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import ROOT
from benchmarks.timing import print_row, print_table, print_title, ratios, spread

IMPORTS = "import torch, deepspeed, transformers"
FLAGS = "--model JiT-XS/2 --max_tokens 256 --train_batch_size 16 --num_samples 0 --log_interval 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", type=Path, default=ROOT / "data" / "web_narrative.txt")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    print_title("Start-up")
    with tempfile.TemporaryDirectory() as folder:
        starts = Starts(args.data_path, Path(folder))
        starts.train("finished", "cache", "--max_steps", "1", until=None)  # also warms the files of all libraries
        seconds: dict[str, list[float]] = {name: [] for name in ("imports", "first start", "second start", "resumed")}
        for turn in range(args.repetitions):
            seconds["imports"].append(run(["-c", IMPORTS])[0])
            seconds["first start"].append(starts.train(f"first{turn}", f"cache{turn}"))
            seconds["second start"].append(starts.train(f"second{turn}", f"cache{turn}"))
            seconds["resumed"].append(starts.train("finished", "cache", "--resume", "latest", "--max_steps", "3"))
    print_table(
        "from the start of the process to the first step",
        "seconds",
        "against the imports",
        "target",
        "corpora tokenised",
    )
    for name, times in seconds.items():
        shown = f"`{IMPORTS}`" if name == "imports" else name
        target = "≤ 2" if name in ("second start", "resumed") else ""
        tokenised = "" if name == "imports" else starts.tokenised[name.split()[0]]
        print_row(shown, spread(times), spread(ratios(times, seconds["imports"])), target, tokenised)


class Starts:
    """Runs of the trainer in a folder, and how many corpora each kind of start tokenised."""

    def __init__(self, data_path: Path, folder: Path):
        self.data_path, self.folder = data_path, folder
        self.tokenised: dict[str, int] = {}

    def train(self, name: str, cache: str, *flags: str, until: str | None = "step ") -> float:
        """Seconds to the first line of the training log that begins with `until`, or to the end."""
        paths = ["--output_dir", self.folder / name, "--cache_dir", self.folder / cache, "--data_path", self.data_path]
        seconds, printed = run(["-m", "ds_tokimg", "train", *FLAGS.split(), *map(str, paths), *flags], until)
        kind = "resumed" if "--resume" in flags else name.rstrip("0123456789")
        self.tokenised[kind] = printed.count("tokenising")
        return seconds


def run(arguments: list[str], until: str | None = None) -> tuple[float, str]:
    """A Python process, ended at the first line that begins with `until`: seconds up to there and what it printed."""
    begun, lines = time.perf_counter(), []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout  # a pipe, as asked for
        for line in process.stdout:
            lines.append(line)
            if until and line.startswith(until):
                seconds = time.perf_counter() - begun
                process.kill()
                return seconds, "".join(lines)
        if process.wait() or until:
            raise SystemExit(f"{' '.join(arguments)} failed with exit code {process.returncode}")
    return time.perf_counter() - begun, "".join(lines)


if __name__ == "__main__":
    main()
