"""How fast data is: tokenising against the bare Rust tokenizer, images from the cache, opening a cached corpus.

    python -m benchmarks.data [--megabytes 100] [--tokenizer FOLDER] [--repetitions 3] > benchmarks/results/data.md

The corpus is the bundled one, its lines shuffled and repeated to the size asked for. Measurements that are compared
take turns in one run; the table gives their median and spread. 100 MB take about four minutes on two cores.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import ROOT
from ds_tokimg.data.corpus import load_corpus, read_texts
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.tokens.tokenizer import load_tokenizer, train_tokenizer, vocab_size

BUNDLED = ROOT / "data" / "web_narrative.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--tokenizer", help="folder; without it a tokenizer of 4,096 ids is trained")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    trained = None if args.tokenizer else train_tokenizer(read_texts(BUNDLED), 4096)
    tokenizer = trained or load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        text = write_corpus(Path(folder) / "corpus.txt", args.megabytes)
        tokenizer.save_pretrained(Path(folder) / "tokenizer")
        print_head(tokenizer, args)
        print_tokenising(text, tokenizer, Path(folder), args.repetitions)
        print_images(text, tokenizer, Path(folder) / "cache")
        print_opening(text, Path(folder), args.repetitions)


def write_corpus(path: Path, megabytes: float) -> Path:
    lines, rng = BUNDLED.read_text().splitlines(keepends=True), random.Random(0)
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            rng.shuffle(lines)
            file.writelines(lines)
    return path


def print_head(tokenizer, args) -> None:
    cores = len(os.sched_getaffinity(0))
    print("# Data\n")
    print(f"`python -m benchmarks.data`, {date.today()}, {cores} cores ({platform.machine()}), ", end="")
    print(f"Python {platform.python_version()}, {args.megabytes:g} MB of text, {vocab_size(tokenizer):,} ids.\n")


# ---- tokenising ----


def print_tokenising(text: Path, tokenizer, folder: Path, repetitions: int) -> None:
    """Ours: from the text file to a data set of packed images, everything included. Bare: `encode_batch_fast` alone."""
    megabytes = text.stat().st_size / 1e6
    bare, ours = [], []
    for i in range(repetitions):
        bare.append([megabytes / seconds for seconds in bare_seconds(text, tokenizer)])
        begun, cpu = time.perf_counter(), cpu_seconds()
        TokenImageDataset(text, tokenizer, cache_dir=folder / ("cache" if i == 0 else f"cache{i}"))
        ours.append([megabytes / (time.perf_counter() - begun), megabytes / (cpu_seconds() - cpu)])
    print("## Tokenising and packing\n")
    print("| median (spread) | MB/s | MB per CPU second |\n|---|---|---|")
    print_row("the Rust tokenizer alone, threads on all cores", bare)
    print_row("text file to packed data set, cache written", ours)
    ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(ours, bare, strict=True)]
    print_row("ratio (target 0.90)", ratios)
    print("\nOn a busy machine the second column is the one to trust.\n")


def print_row(name: str, rows: Sequence[Sequence[float]]) -> None:
    cells = [f"{median(column):.2f} ({spread(column)})" for column in zip(*rows, strict=True)]
    print(f"| {name} | {' | '.join(cells)} |")


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    return sum(os.times()[:4])


def bare_seconds(text: Path, tokenizer) -> tuple[float, float]:
    """Seconds and CPU seconds in the tokenizer only: reading the file does not count, the results are dropped."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    encode, seconds, cpu = tokenizer.backend_tokenizer.encode_batch_fast, 0.0, 0.0
    with open(text) as file:
        while batch := [line.rstrip("\n") for line, _ in zip(file, range(1000), strict=False)]:
            begun, cpu_begun = time.perf_counter(), time.process_time()
            encode(batch, add_special_tokens=False)
            seconds, cpu = seconds + time.perf_counter() - begun, cpu + time.process_time() - cpu_begun
    return seconds, cpu


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


# ---- images ----


def print_images(text: Path, tokenizer, cache: Path) -> None:
    """One thread, in CPU time; samples in random order, as in training."""
    import torch

    torch.set_num_threads(1)
    print("## From the cache, one core, random order\n")
    print("| | million tokens per CPU second, median | spread |\n|---|---|---|")
    rows: dict[str, dict[str, Any]] = {
        "ids, full images": {},
        "images, 4,096 tokens each": {},
        "images, validation split left out": {"split": "train"},
        "images, token_size 2, 1,024 tokens each": {"token_size": 2},
    }
    for name, options in rows.items():
        dataset = TokenImageDataset(text, tokenizer, cache_dir=cache, **options)
        get = dataset.ids if name.startswith("ids") else dataset.__getitem__
        rates = [tokens_per_second(dataset, get) / 1e6 for _ in range(9)]
        print(f"| {name} | {median(rates):.1f} | {spread(rates)} |")
    print("\nTarget: 20 million tokens/s as images (token_size 1).\n")


def tokens_per_second(dataset, get, samples: int = 400) -> float:
    order = random.sample(range(len(dataset) - 1), min(samples, len(dataset) - 1))
    begun = time.process_time()
    for i in order:
        get(i)
    return len(order) * dataset.max_tokens / (time.process_time() - begun)


# ---- opening ----

OPEN = """
import ctypes, json, sys, time
from ds_tokimg.tokens.tokenizer import load_tokenizer
from ds_tokimg.data.dataset import TokenImageDataset

def resident():
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is freed but kept by the allocator is not held
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) / 1e3, int(fields["RssFile"].split()[0]) / 1e3

tokenizer = load_tokenizer(sys.argv[2])
TokenImageDataset(sys.argv[4], tokenizer, cache_dir=sys.argv[3])  # a small one: what libraries take is taken now
before, begun = resident(), time.perf_counter()
dataset = TokenImageDataset(sys.argv[1], tokenizer, cache_dir=sys.argv[3], split="train")
seconds = time.perf_counter() - begun
after = resident()
corpus = dataset.corpus
index = [corpus.lengths, corpus.starts]
index += [dataset._bounds, dataset._run_starts, dataset._run_sources]
print(json.dumps({
    "seconds": seconds, "anonymous": after[0] - before[0], "mapped": after[1] - before[1],
    "index": sum(a.nbytes for a in index) / 1e6, "tokens": 4 * len(corpus.tokens) / 1e6,
    "imported_datasets": "datasets" in sys.modules,
}))
"""


def print_opening(text: Path, folder: Path, repetitions: int) -> None:
    """A fresh process opens the cached corpus; memory is what the process grew by."""
    cache, small = folder / "cache", folder / "small.txt"
    small.write_text("a line\n")
    for path in (text, small):
        load_corpus(path, load_tokenizer(folder / "tokenizer"), cache_dir=cache)
    command = [sys.executable, "-c", OPEN, *map(str, (text, folder / "tokenizer", cache, small))]
    runs = []
    for _ in range(repetitions):
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    seconds = [run["seconds"] for run in runs]
    middle = runs[0]
    print("## Opening the cached corpus in a new process\n")
    print("| | |\n|---|---|")
    print(f"| seconds (target < 1) | {median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f}) |")
    print(f"| memory held, MB | {median(run['anonymous'] for run in runs):.1f} |")
    print(f"| the index, MB | {middle['index']:.1f} |")
    print(f"| file pages touched, MB | {median(run['mapped'] for run in runs):.1f} |")
    print(f"| tokens on disk, MB | {middle['tokens']:.1f} |")
    print(f"| `datasets` imported | {'yes' if middle['imported_datasets'] else 'no'} |")


if __name__ == "__main__":
    main()
