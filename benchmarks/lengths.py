"""What a text costs: step time against its length, and the share of positions that are computed in vain.

    python -m benchmarks.lengths [--data_path FILE ...] > benchmarks/results/lengths.md

1. The trainer's default model on batches of 32 texts of one length, one an image, the lengths taking turns, and the
   straight line through the times over the patches that hold tokens.
2. For real texts, one an image: the share of the patches that go through the transformer which hold a token, over an
   epoch of batches as the trainer forms them, and as they would be without looking at lengths.
3. The loss of a batch of mixed lengths computed at once, and in pieces of similar length.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT
from benchmarks.timing import print_row, print_table, print_title, spread, take_turns
from benchmarks.trainer import Texts, batch_of, engine_of, maker_of, module_of
from ds_tokimg.data.corpus import read_texts
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.tokens.tokenizer import train_tokenizer

LENGTHS = (100, 200, 400, 1000, 2000, 4096)
BATCH = 32
SLOTS = 16  # tokens a patch of 4 x 4
SHORT, LONG, TARGET = 200, 4096, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    bundled = [ROOT / "data" / "definitions.jsonl", ROOT / "data" / "web_narrative.txt"]
    parser.add_argument("--data_path", nargs="+", type=Path, default=bundled, help="texts for the second part")
    parser.add_argument("--batch", type=int, default=BATCH, help="texts a step of the first part")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    print_title("The cost of a text follows its length")
    print_times(args.batch, args.repetitions)
    print_padding(args.data_path)
    print_equality()


def print_times(images: int, repetitions: int) -> None:
    config = TrainConfig(data_path=["-"], train_batch_size=images)
    engine = engine_of(config)
    batches = {n: batch_of(engine.module, config, [n] * images) for n in LENGTHS}
    rivals = {n: partial(engine.train_batch, [batch]) for n, batch in batches.items()}
    seconds = take_turns(rivals, repetitions, warm_up=2)
    patches = {n: batch.mask.any(-1).sum().item() // images for n, batch in batches.items()}
    slope, constant = np.polyfit([patches[n] for n in LENGTHS], [median(seconds[n]) for n in LENGTHS], 1)
    print(f"## Step time, {config.model}, {images} texts of one length\n")
    print_table("tokens a text", "patches a text", "ms a step", "the line", "times cheaper than 4,096 tokens")
    for n in LENGTHS:
        cheaper = [whole / part for whole, part in zip(seconds[LONG], seconds[n], strict=True)]
        line = 1e3 * (constant + slope * patches[n])
        print_row(n, patches[n], spread([1e3 * s for s in seconds[n]], 0), f"{line:.0f}", spread(cheaper, 1))
    print(
        f"\nThe line: {1e3 * constant:.0f} ms + {1e3 * slope:.2f} ms a patch. Target: at {SHORT} tokens at least",
        end=" ",
    )
    print(f"{TARGET} times cheaper than at {LONG:,} (patches: {patches[LONG] / patches[SHORT]:.1f} times fewer).\n")


def print_padding(paths: list[Path]) -> None:
    print("## Patches computed that hold tokens, an epoch of batches of 32, one text an image\n")
    head = ("texts", "tokens a text, median (to the longest)", "by length", "target", "as they come")
    print_table(*head, "by length, of the slots for tokens in them")
    for path in paths:
        tokenizer = train_tokenizer(read_texts(path), 1024)
        with tempfile.TemporaryDirectory() as folder:
            data = TokenImageDataset(path, tokenizer, packing=False, cache_dir=folder)
            (patches, slots), (unsorted, _) = (valid_shares(data.lengths, bucket) for bucket in (True, False))
        texts = f"{path.name}, {len(data):,} images"
        lengths = f"{median(data.lengths):.0f} ({data.lengths.max():,})"
        print_row(texts, lengths, f"{patches:.1%}", "≥ 90 %", f"{unsorted:.1%}", f"{slots:.1%}")
    print()


def valid_shares(lengths: np.ndarray, bucket: bool) -> tuple[float, float]:
    """Of the patches of an epoch's batches, each as wide as its longest text, and of their slots: what holds tokens."""
    patches = -(-lengths.astype(np.int64) // SLOTS)
    batches = TrainBatchSampler(lengths, BATCH, seed=0, bucket=bucket).batches(0)
    computed = sum(patches[batch].max() * len(batch) for batch in batches)
    valid, tokens = (sum(values[batch].sum() for batch in batches) for values in (patches, lengths))
    return valid / computed, tokens / (computed * SLOTS)


@torch.no_grad()
def print_equality() -> None:
    config = TrainConfig(data_path=["-"], batch_size=BATCH)
    module = module_of(config)
    model: Any = module.model
    torch.nn.init.normal_(model.head.to_tokens.weight, std=0.1)  # a fresh model does not look at its context
    for layer in model.layers:
        torch.nn.init.normal_(layer.offset, std=0.3)
    lengths = np.random.default_rng(0).integers(1, 1000, BATCH)
    texts, maker, order = Texts(config.vocab_size, lengths), maker_of(module, config), np.argsort(lengths)
    at_once = float(module(maker(texts, order, order, 0))["loss_sum"])
    pieces = [order[i : i + 4] for i in range(0, BATCH, 4)]
    in_pieces = sum(float(module(maker(texts, piece, piece, 0))["loss_sum"]) for piece in pieces)
    print(f"## Loss of {BATCH} texts of 1 to 1,000 tokens\n")
    print(
        f"At once, padded to the longest: {at_once / lengths.sum():.7f} nats a token. In pieces of similar length:",
        end=" ",
    )
    print(f"{in_pieces / lengths.sum():.7f}. Relative difference: {abs(in_pieces / at_once - 1):.1e}.")


if __name__ == "__main__":
    main()
