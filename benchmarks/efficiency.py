"""Which share of the machine's rate on large matrix products the training step reaches.

    python -m benchmarks.efficiency [--model JiT-B/4 --batch 4 --tokens 4096] > benchmarks/results/efficiency.md

Both rates are measured in one process, taking turns; each model has a process of its own, as a run has. The step is the
trainer's own (DeepSpeed engine, stage 0, fp32, AdamW, clipping, one moving average) on full images. Its operations are
those of `ds_tokimg.model.flops`: the matrix products of the model's definition, 2 per multiply-add, forward plus
backward;
nothing that an implementation adds to them, and nothing for norms, softmax or the optimiser. A recipe is measured
with the train batch that it has for a small corpus.
"""

import argparse
import subprocess
import sys
from statistics import median

import torch

from benchmarks import ROOT
from benchmarks.timing import print_row, print_table, print_title, spread, take_turns
from benchmarks.trainer import batch_of, engine_of
from ds_tokimg import recipes
from ds_tokimg.settings.command_line import recipe_values
from ds_tokimg.settings.config import TrainConfig

SIZE = 2048  # of the square matrices that the step is compared with
#        name, images a batch, tokens an image
MODELS = (("JiT-B/4", 4, 4096), ("JiT-XS/2", 16, 256), ("left-to-right", 2, 256))
TARGETS = {"JiT-B/4": "≥ 0.8", "JiT-XS/2": "≥ 0.5"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="one model or recipe instead of the three")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print_share(args.model, args.batch, args.tokens, args.repetitions)
        return
    print_title("Matrix products: the share of the machine's rate that a training step reaches")
    print_table("model", "images × tokens", "GFLOP a step", "GFLOP/s in products", "in the step", "share", "target")
    for name, batch, tokens in [(args.model, args.batch, args.tokens)] if args.model else MODELS:
        flags = ["--model", name, "--batch", batch, "--tokens", tokens, "--repetitions", args.repetitions, "--row"]
        subprocess.run([sys.executable, "-m", "benchmarks.efficiency", *map(str, flags)], check=True, cwd=ROOT)


def print_share(name: str, batch: int, tokens: int, repetitions: int) -> None:
    options = recipe_values(name) if name in recipes.names() else {"model": name}
    config = TrainConfig(data_path=["-"], batch_size=batch, **options)
    engine = engine_of(config)
    micro_batch = batch_of(engine.module, config, [tokens] * batch)
    flops = engine.module.flops(micro_batch)
    left, right, result = (torch.randn(SIZE, SIZE) for _ in range(3))
    rivals = {
        "products": lambda: torch.mm(left, right, out=result),
        "step": lambda: engine.train_batch([micro_batch]),
    }
    seconds = take_turns(rivals, repetitions, warm_up=2)
    products = [2 * SIZE**3 / s / 1e9 for s in seconds["products"]]
    step = [flops / s / 1e9 for s in seconds["step"]]
    share = [rate / median(products) for rate in step]
    cells = (f"{flops / 1e9:.0f}", spread(products, 0), spread(step, 0), spread(share))
    print_row(name, f"{batch} × {tokens:,}", *cells, TARGETS.get(name, ""))


if __name__ == "__main__":
    main()
