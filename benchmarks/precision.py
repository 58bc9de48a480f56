"""What smaller images and half precision save: time and peak memory of the training step, per image and per token.

    python -m benchmarks.precision [--model JiT-S/4] [--images 16] > benchmarks/results/precision.md

The same script serves on a GPU; the page ends with the line to run there.

All rivals are full of tokens and have patches of one size: images of 64 and of 256 pixels a side in fp32, as many
tokens a step in both, then 64 pixels in each precision that the machine has. Each is a process of its own, so that its
peak memory is its own, and they take turns. Memory is what the step needs beyond weights, gradients and optimiser
states, which a step on one token an image has brought in before.
"""

import argparse
import json
import resource
import subprocess
import sys
from statistics import median

from benchmarks import ROOT
from benchmarks.timing import print_row, print_table, print_title, ratios, spread, take_turns

PRECISIONS = {
    "bf16": {"bf16": {"enabled": True}},
    "bf16 autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "fp16": {"fp16": {"enabled": True}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="JiT-S/4")
    parser.add_argument("--images", type=int, default=16, help="small ones, in a step")
    parser.add_argument(
        "--sizes", type=int, nargs=2, default=(64, 256), help="pixels a side of small and of large images"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(**json.loads(args.worker))
        return
    print_title("Image size and precision: the training step")
    small, large = args.sizes
    base = {"model": args.model, "images": args.images, "img_size": small, "blocks": {}}
    other = base | {"images": max(1, args.images * small**2 // large**2), "img_size": large}
    compare_sizes({f"{size} × {size}": spec for size, spec in ((small, base), (large, other))}, args.repetitions)
    compare_precisions(
        {"fp32": base} | {name: base | {"blocks": b} for name, b in PRECISIONS.items()}, args.repetitions
    )
    print("\nOn a GPU: `CUDA_VISIBLE_DEVICES=0 python -m benchmarks.precision --model JiT-B/4 --images 64`")


# ---- the tables ----


def compare_sizes(specs: dict[str, dict], repetitions: int) -> None:
    workers, seconds = measure(specs, repetitions)
    (small, large), (small_times, large_times) = workers.values(), seconds.values()
    print(f"## Image size, {small.spec['model']}, fp32, {small.device}\n")
    print_table("image", "images a step", "ms an image", "µs a token", "MB an image", "kB a token", "GFLOP an image")
    for name, worker in workers.items():
        print_row(name, worker.images, *worker.per_image_and_token(seconds[name]), f"{worker.flops / 1e9:.1f}")
    times = [r * small.images / large.images for r in ratios(large_times, small_times)]
    memory = (large.peak / large.images) / (small.peak / small.images)
    tokens = (large.spec["img_size"] / small.spec["img_size"]) ** 2
    print_row(
        "ratio",
        "",
        spread(times, 1),
        spread([t / tokens for t in times]),
        f"{memory:.1f}",
        f"{memory / tokens:.2f}",
        f"{large.flops / small.flops:.1f}",
    )
    print()


def compare_precisions(specs: dict[str, dict], repetitions: int) -> None:
    workers, seconds = measure(specs, repetitions)
    reference = workers["fp32"]
    size = reference.spec["img_size"]
    print(f"## Precision, {reference.spec['model']}, {size} × {size}, {reference.device}\n")
    print_table(
        "precision",
        "ms an image",
        "µs a token",
        "MB an image",
        "kB a token",
        "times faster",
        "times less memory",
        "large products, times faster",
    )
    for name, worker in workers.items():
        if worker.refusal:
            print_row(name, worker.refusal, *[""] * 6)
            continue
        faster = spread(ratios(seconds["fp32"], seconds[name]))
        less = f"{reference.peak / worker.peak:.2f}"
        products = f"{worker.products / reference.products:.1f}"
        print_row(name, *worker.per_image_and_token(seconds[name]), faster, less, products)


def measure(specs: dict[str, dict], repetitions: int):
    """Workers by name and the seconds of their steps; those that the machine refuses have none."""
    workers = {name: Worker(spec) for name, spec in specs.items()}
    rivals = {name: worker.step for name, worker in workers.items() if not worker.refusal}
    seconds = take_turns(rivals, repetitions)
    for worker in workers.values():
        worker.end()
    return workers, seconds


# ---- one process per rival ----


class Worker:
    """A process with an engine; `peak` is in bytes, `flops` per image, `products` in operations a second."""

    def __init__(self, spec: dict):
        self.spec, self.images, self.peak = spec, spec["images"], 0
        command = [sys.executable, "-m", "benchmarks.precision", "--worker", json.dumps(spec)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        assert self.process.stdin and self.process.stdout  # pipes, as asked for
        self.input, self.output = self.process.stdin, self.process.stdout
        ready = self._answer()
        self.refusal, self.device = ready.get("refusal"), ready.get("device")
        self.flops, self.products = ready.get("flops"), ready.get("products")

    def step(self) -> None:
        print(file=self.input, flush=True)
        self.peak = self._answer()["peak"]

    def end(self) -> None:
        self.input.close()
        self.process.wait()

    def per_image_and_token(self, seconds: list[float]) -> tuple[str, str, str, str]:
        tokens = self.spec["img_size"] ** 2
        image, memory = [1e3 * s / self.images for s in seconds], self.peak / self.images
        return (
            spread(image, 0),
            f"{1e3 * median(image) / tokens:.1f}",
            f"{memory / 1e6:.0f}",
            f"{memory / tokens / 1e3:.1f}",
        )

    def _answer(self) -> dict:
        for line in self.output:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the process for {self.spec} ended with exit code {self.process.wait()}")


def work(model: str, images: int, img_size: int, blocks: dict) -> None:
    """Takes a step for every line of the standard input."""
    from benchmarks.trainer import batch_of, engine_of
    from ds_tokimg.errors import UserError
    from ds_tokimg.model.flops import matmul_peak
    from ds_tokimg.settings.config import TrainConfig

    config = TrainConfig(
        data_path=["-"], model=model, img_size=img_size, batch_size=images, use_amp=None if blocks else False
    )
    try:
        engine = engine_of(config, **blocks)
    except UserError:
        print(json.dumps({"refusal": "not on this machine"}), flush=True)
        return
    device, module = engine.dist.device, engine.module
    engine.train_batch([batch_of(module, config, [1] * images)]).sums  # noqa: B018 (waits for an accelerator)
    before = memory(device)
    batch = batch_of(module, config, [img_size**2] * images)
    ready = {"device": device.type, "flops": module.flops(batch) / images}
    print(json.dumps(ready | {"products": matmul_peak(device, engine.compute_dtype)}), flush=True)
    for _ in sys.stdin:
        engine.train_batch([batch]).sums  # noqa: B018
        print(json.dumps({"peak": memory(device) - before}), flush=True)


def memory(device) -> int:
    """The most memory that was in use so far, bytes."""
    import torch

    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)


if __name__ == "__main__":
    main()
