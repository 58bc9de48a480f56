"""Whether a stream's memory and disk stay flat as the corpus grows, beside those of the cached corpus.

    python -m benchmarks.streaming [--megabytes 64 256] > benchmarks/results/streaming.md

The corpus is the bundled one, its lines shuffled and repeated to the size asked for. A fresh process goes through one
epoch of train batches of 16 images without computing anything with them. About five minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import ROOT
from benchmarks.data import BUNDLED, write_corpus
from benchmarks.timing import print_row, print_table, print_title
from ds_tokimg.data.corpus import read_texts
from ds_tokimg.tokens.tokenizer import train_tokenizer

EPOCH = """
import contextlib, json, resource, sys, time
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.data.sources import find_all
from ds_tokimg.data.stream import Place, Sampled, stream_of
from ds_tokimg.data.tokenise import Settings
from ds_tokimg.tokens.tokenizer import load_tokenizer

how, text, folder, cache = sys.argv[1:]
tokenizer, tokens, first = load_tokenizer(folder), 0, None
libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()

def seen(dataset, samples):
    global tokens, first
    first = first or time.perf_counter() - begun
    tokens += sum(len(dataset.ids(int(i))) for i in samples)

if how == "streamed":
    sample = TokenImageDataset(text, tokenizer, split="train", load=Sampled())
    stream = stream_of(sample, find_all(text), tokenizer, Settings(False, False), seed=0)
    with contextlib.closing(stream.batches(Place(), 16)) as batches:
        for dataset, samples, place in batches:
            if place.epoch:
                break
            seen(dataset, samples)
else:
    dataset = TokenImageDataset(text, tokenizer, split="train", cache_dir=cache)
    for samples in TrainBatchSampler(dataset.lengths, 16, seed=0).batches(0):
        seen(dataset, samples)
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
megabytes = {"peak": peak / 1e3, "libraries": libraries / 1e3}
print(json.dumps({"first": first, "seconds": seconds, "tokens": tokens} | megabytes))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[64, 256])
    args = parser.parse_args()
    print_title("Streaming: an epoch of batches, beside the cache (a tokenizer of 4,096 ids)")
    head = ("MB of text", "", "peak memory, MB", "of it libraries", "disk, MB", "s to the first batch")
    print_table(*head, "million tokens/s")
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(read_texts(BUNDLED), 4096).save_pretrained(Path(folder) / "tokenizer")
            text = write_corpus(Path(folder) / "corpus.txt", megabytes)
            for how in ("streamed", "cached"):
                print_epoch(how, megabytes, text, Path(folder))
    print("\nMapped pages of the cache count as memory, and are given back when others need it.")


def print_epoch(how: str, megabytes: float, text: Path, folder: Path) -> None:
    cache = folder / "cache"
    command = [sys.executable, "-c", EPOCH, how, *map(str, (text, folder / "tokenizer", cache))]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    found = json.loads(output.splitlines()[-1])
    disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e6
    rate = found["tokens"] / found["seconds"] / 1e6
    memory = (f"{found['peak']:.0f}", f"{found['libraries']:.0f}")
    print_row(f"{megabytes:g}", how, *memory, f"{disk:.0f}", f"{found['first']:.1f}", f"{rate:.2f}")


if __name__ == "__main__":
    main()
