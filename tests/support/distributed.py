"""Real gloo ranks for tests, and a tiny module to train on them.

A server process imports deepspeed once; every case gets fresh ranks forked from it, with a port of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback

import torch
from torch import Tensor, nn

from ds_tokimg.engine.engine import TrainEngine, init_distributed

POSITIONS = 6
_context = multiprocessing.get_context("forkserver")
# What a run imports, most of it late: transformers with the tokenizer, torch its compiler with the first optimiser.
_context.set_forkserver_preload(["tests.support.imports"])


def run_ranks(world_size: int, function, *args, timeout: float = 300.0) -> list:
    """`function(dist, *args)` on fresh ranks -> their results in rank order.

    `function` is a module's own function; its results are small and picklable. Fails with the first rank's traceback,
    or after `timeout` seconds, and leaves no process behind.
    """
    processes, results = start_ranks(world_size, function, *args)
    try:
        values = _collect(processes, results, time.monotonic() + timeout)
        for process in processes:
            process.join(30)  # they leave together
        return values
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_ranks(world_size: int, function, *args, timeout_minutes: float = 4.0) -> tuple[list, multiprocessing.Queue]:
    """Started processes, one per rank, and the queue in which each puts (rank, result, traceback), pickled.

    `timeout_minutes` is the collectives' own: how long ranks wait for one that hangs.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # the server passes it on
    results, port = _context.Queue(), free_port()
    processes = [
        _context.Process(
            target=_rank_main, args=(rank, world_size, port, timeout_minutes, results, function, args), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, results


def _rank_main(rank, world_size, port, timeout_minutes, results, function, args) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        dist = init_distributed(timeout_minutes)
        # Pickled here: the queue's own pickling shares the memory of tensors with a process that is about to end.
        results.put(pickle.dumps((rank, function(dist, *args), None)))
        dist.barrier()
    except BaseException:
        results.put(pickle.dumps((rank, None, traceback.format_exc())))
        raise


def _collect(processes: list, results, deadline: float) -> list:
    values: dict[int, object] = {}
    while len(values) < len(processes):
        try:
            remaining = max(0.01, min(1.0, deadline - time.monotonic()))
            rank, value, error = pickle.loads(results.get(timeout=remaining))
        except queue.Empty:
            dead = [rank for rank, p in enumerate(processes) if p.exitcode not in (None, 0) and rank not in values]
            if dead or time.monotonic() > deadline:
                raise AssertionError(f"ranks {dead} died" if dead else "ranks did not finish in time") from None
            continue
        if error is not None:
            raise AssertionError(f"rank {rank}:\n{error}")
        values[rank] = value
    return [values[rank] for rank in range(len(processes))]


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Tensors(dict):
    """A batch: tensors by name."""

    def to(self, device) -> Tensors:
        return Tensors({name: value.to(device) for name, value in self.items()})


class TinyModule(nn.Module):
    """A regression with matrices and vectors of odd sizes, so that every partition of them is padded."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.LayerNorm(13), nn.Linear(13, 5))

    def forward(self, batch: Tensors) -> dict[str, Tensor]:
        """batch: x [B, T, 7], y [B, T, 5], mask [B, T] -> {"loss_sum", "inputs" (sum of all valid x)}."""
        prediction = self.model(batch["x"].to(self.model[0].weight.dtype)).float()
        squared_error = ((prediction - batch["y"]) ** 2).sum(-1)  # [B, T]
        inputs = (batch["x"] * batch["mask"][..., None]).sum()
        return {"loss_sum": (squared_error * batch["mask"]).sum(), "inputs": inputs}

    def count(self, batch: Tensors) -> int:
        """Valid positions."""
        return int(batch["mask"].sum())


def make_batch(step: int, size: int = 8) -> Tensors:
    """Train batch of a step: texts of 0 to T valid positions."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, POSITIONS, 7, generator=generator)
    y = torch.randn(size, POSITIONS, 5, generator=generator)
    lengths = torch.randint(0, POSITIONS + 1, (size, 1), generator=generator)
    lengths[0] = POSITIONS
    return Tensors(x=x, y=y, mask=(torch.arange(POSITIONS) < lengths).float())


def cut(batch: Tensors, rank: int, world_size: int, accumulation: int) -> list[Tensors]:
    """This rank's micro-batches: equal shares of the train batch."""
    pieces = {name: value.chunk(world_size * accumulation) for name, value in batch.items()}
    places = range(rank * accumulation, (rank + 1) * accumulation)
    return [Tensors({name: p[place] for name, p in pieces.items()}) for place in places]


def engine_config(stage: int, world_size: int, accumulation: int = 1, size: int = 8, **blocks) -> dict:
    """A resolved DeepSpeed JSON; `blocks` add to it or take the place of its entries."""
    return {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": size // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 30, "warmup_num_steps": 3, "warmup_type": "linear"},
        },
        "zero_optimization": {"stage": stage},
        **blocks,
    }


def tiny_engine(dist, stage: int, ema_decay=0.9, seed: int = 0, accumulation: int = 1, **blocks) -> TrainEngine:
    """A TrainEngine around a TinyModule; other ranks than the first start from other weights."""
    config = engine_config(stage, dist.world_size, accumulation, **blocks)
    return TrainEngine(TinyModule(seed + dist.rank), config, ema_decay, dist)


def train(engine: TrainEngine, steps: int) -> list:
    """The next `steps` steps -> their results."""
    return [
        engine.train_batch(
            cut(make_batch(engine.global_steps), engine.dist.rank, engine.dist.world_size, engine.accumulation)
        )
        for _ in range(steps)
    ]


def full_state(engine: TrainEngine) -> dict[str, Tensor]:
    """All weights and optimiser states, whole, by "name/key". Collective."""
    shards = engine.shards
    return {
        f"{name}/{key}": shards.full(param, key).clone()
        for name, param in shards.params.items()
        for key in ("fp32", *shards.keys)
    }
