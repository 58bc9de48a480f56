"""How much slower the DeepSpeed step is than a plain PyTorch loop of the same model, data and optimiser.

    python -m benchmarks.overhead [--model JiT-XS/2 --batch 16 --tokens 256] > benchmarks/results/overhead.md

The plain loop does what training needs and nothing else: forward, backward, clipping, the learning rate of the
schedule, the fused AdamW with its moving average, and reading the loss. All rivals take turns in one process, on
batches of their own model.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import print_row, print_table, print_title, ratios, spread, take_turns
from benchmarks.trainer import batch_of, engine_of, join, module_of, settings_of
from ds_tokimg.data.batch import Batch
from ds_tokimg.engine.engine import TrainEngine
from ds_tokimg.engine.optimizer import build_optimizer
from ds_tokimg.settings.config import TrainConfig

TARGET = 1.03
#        name, images a batch, tokens an image
MODELS = (("JiT-XS/2", 16, 256), ("JiT-S/4", 4, 4096))


class PlainLoop:
    """One optimiser step in plain PyTorch."""

    def __init__(self, config: TrainConfig):
        self.module = module_of(config).to(join().device)
        self.max_norm = settings_of(config)["gradient_clipping"]
        self.optimizer = build_optimizer(self.module.parameters(), settings_of(config)["optimizer"], config.ema_decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 1000)

    def step(self, batch: Batch) -> float:
        batch = batch.to(join().device)
        loss = self.module(batch)["loss_sum"] / self.module.count(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.max_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="one model instead of the two")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    join()
    print_title("The DeepSpeed step against a plain PyTorch loop, one rank, fp32")
    print_table("model", "images × tokens", "loop", "ms a step", "against the plain loop", "target")
    for name, batch, tokens in [(args.model, args.batch, args.tokens)] if args.model else MODELS:
        print_overhead(name, batch, tokens, args.repetitions)


def loss_of_step(engine: TrainEngine, micro_batch: Batch) -> float:
    return engine.train_batch([micro_batch]).loss


def print_overhead(name: str, batch: int, tokens: int, repetitions: int) -> None:
    config = TrainConfig(data_path=["-"], model=name, batch_size=batch, use_amp=False)
    plain = PlainLoop(config)
    engines = {f"stage {stage}": engine_of(config, zero_optimization={"stage": stage}) for stage in (0, 1)}
    micro_batch = batch_of(plain.module, config, [tokens] * batch)
    rivals: dict[str, Callable[[], float]] = {"plain": partial(plain.step, micro_batch)}
    rivals |= {loop: partial(loss_of_step, engine, micro_batch) for loop, engine in engines.items()}
    seconds = take_turns(rivals, repetitions, warm_up=4)
    for loop, times in seconds.items():
        quotients = spread(ratios(times, seconds["plain"]), 3)
        cells = ("", "") if loop == "plain" else (quotients, f"≤ {TARGET}")
        print_row(name, f"{batch} × {tokens:,}", loop, spread([1e3 * s for s in times], 1), *cells)


if __name__ == "__main__":
    main()
