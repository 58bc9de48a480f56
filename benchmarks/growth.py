"""How speed changes with batch, width, depth and corpus: what a bigger run costs, and that nothing outgrows its work.

    python -m benchmarks.growth [--parts model corpus] [--megabytes 1 10 100 1000] > benchmarks/results/growth.md

Models: batches of full 64 × 64 images; operations as in `ds_tokimg.model.flops`. Corpora: the bundled text, its lines
shuffled and repeated; 1 GB takes about five minutes on two cores and 3 GB of the disk for the time being.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import ROOT
from benchmarks.data import BUNDLED, write_corpus
from benchmarks.timing import print_row, print_table, print_title, spread, take_turns

TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("model", "corpus"), default=["model", "corpus"])
    parser.add_argument("--megabytes", nargs="+", type=float, default=[1, 10, 100, 1000])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    print_title(f"Growth: {' and '.join(args.parts)}")
    if "model" in args.parts:
        print_models(args.repetitions)
    if "corpus" in args.parts:
        print_corpora(args.megabytes)


# ---- models ----


def print_models(repetitions: int) -> None:
    from ds_tokimg.model.config import SIZES

    depth, width, heads = SIZES["XS"]
    print_growth("Batch", "images", {n: ("XS", n) for n in (1, 2, 4, 8, 16, 32)}, repetitions)
    for factor in (1, 2, 4):
        SIZES[f"W{factor}"] = (depth, factor * width, factor * heads)
        SIZES[f"D{factor}"] = (factor * depth, width, heads)
    print_growth("Width", "channels", {f * width: (f"W{f}", 4) for f in (1, 2, 4)}, repetitions)
    print_growth("Depth", "blocks", {f * depth: (f"D{f}", 4) for f in (1, 2, 4)}, repetitions)


def print_growth(title: str, unit: str, models: dict[int, tuple[str, int]], repetitions: int) -> None:
    """`models`: {what grows: (size, images a step)}."""
    from benchmarks.trainer import batch_of, engine_of
    from ds_tokimg.settings.config import TrainConfig

    rivals, flops = {}, {}
    for grown, (size, images) in models.items():
        config = TrainConfig(data_path=["-"], model=f"JiT-{size}/4", batch_size=images)
        engine = engine_of(config)
        batch = batch_of(engine.module, config, [TOKENS] * images)
        flops[grown] = engine.module.flops(batch)
        rivals[grown] = partial(engine.train_batch, [batch])
    seconds = take_turns(rivals, repetitions, warm_up=2)
    print(f"## {title}\n")
    print_table(unit, "ms a step", "tokens/s", "GFLOP a step", "GFLOP/s", "time a FLOP, against the first row")
    first = None
    for grown, (_, images) in models.items():
        middle = median(seconds[grown])
        first = first or middle / flops[grown]
        cells = (f"{TOKENS * images / middle:,.0f}", f"{flops[grown] / 1e9:.1f}", f"{flops[grown] / middle / 1e9:.0f}")
        print_row(grown, spread([1e3 * s for s in seconds[grown]], 0), *cells, f"{middle / flops[grown] / first:.2f}")
    print()


# ---- corpora ----


def print_corpora(sizes: list[float]) -> None:
    print("## Corpus\n")
    print("Tokenised by a first process, opened by a second one; memory is the peak of the process and its children,")
    print("with the pages of the cache file that counting all tokens brings in.\n")
    head = ("MB", "million tokens", "tokenised, MB/s", "peak MB", "opened, s", "an epoch's order, s", "32 images, ms")
    print_table(*head, "tokens counted, s", "peak MB once open")
    from ds_tokimg.data.corpus import read_texts
    from ds_tokimg.tokens.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(read_texts(BUNDLED), 1024).save_pretrained(Path(folder) / "tokenizer")
        for megabytes in sizes:
            text = write_corpus(Path(folder) / "corpus.txt", megabytes)
            first, second = (start(text, Path(folder)) for _ in range(2))
            cells = [
                f"{first['tokens'] / 1e6:.1f}",
                f"{text.stat().st_size / 1e6 / first['open']:.1f}",
                f"{first['peak']:.0f}",
            ]
            cells += [f"{second['open']:.3f}", f"{second['order']:.3f}", f"{1e3 * second['images']:.0f}"]
            print_row(f"{megabytes:g}", *cells, f"{second['counts']:.2f}", f"{second['peak']:.0f}")
            for file in (Path(folder) / "cache").rglob("*.arrow"):
                file.unlink()


def start(text: Path, folder: Path) -> dict:
    """What a process needs that opens the corpus, tokenising it if need be."""
    command = [sys.executable, "-c", START, *map(str, (text, folder / "tokenizer", folder / "cache"))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(printed.splitlines()[-1])


START = """
import json, resource, sys, time
import torch
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.tokens.tokenizer import load_tokenizer

tokenizer, seconds, begun = load_tokenizer(sys.argv[2]), {}, 0.0

def lap(name):
    global begun
    now = time.perf_counter()
    seconds[name], begun = now - begun, now

begun = time.perf_counter()
data = TokenImageDataset(sys.argv[1], tokenizer, cache_dir=sys.argv[3], split="train")
lap("open")
sampler = TrainBatchSampler(data.lengths, 32, seed=0)
batches = sampler.batches(0)
lap("order")
for i in batches[0]:
    data[int(i)]
lap("images")
data.token_counts()
lap("counts")
kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
seconds["peak"] = sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1e3
print(json.dumps(seconds | {"tokens": data.num_tokens}))
"""


if __name__ == "__main__":
    main()
