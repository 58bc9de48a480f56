"""How long a run would take on this machine, and how much of it its validations."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch

from ds_tokimg.console import Work
from ds_tokimg.data.batch import Batch
from ds_tokimg.data.order import TrainBatchSampler, partition
from ds_tokimg.engine.optimizer import build_optimizer
from ds_tokimg.engine.ranks import OnlyRank
from ds_tokimg.errors import UserError
from ds_tokimg.inference.loading import choose_device
from ds_tokimg.model.flops import matmul_peak
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training import budget
from ds_tokimg.training.assemble import Parts, assemble
from ds_tokimg.training.report import times_due

WARM_UP, STEPS = 1, 3
# Steps that would take longer in all are not made.
LONGEST_SECONDS = 30.0
# What a step reaches of the rate of large matrix products, roughly (benchmarks/results/efficiency.md).
EFFICIENCY = 0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "torch_autocast": torch.bfloat16}


def duration(config: TrainConfig, parts: Parts, settings: dict, world_size: int, accelerator: str) -> dict | None:
    """Seconds of a step and of a run, as JSON values; None where this machine is not of the kind that is planned for.

    A few steps of the real model on its first batches are made, or, where these would take too long, what they take is
    estimated from their operations and the machine's rate of matrix products. Of several ranks one is meant, on a
    machine of its own: what ranks wait for each other is not in it, nor are loading and saving.

    parts: of this run; their module may be without weights.
    """
    device = _device(accelerator)
    if device is None:
        return None
    precision = next((name for name in DTYPES if settings.get(name, {}).get("enabled")), "fp32")
    batches = first_batches(parts, settings, world_size)
    flops = sum(parts.module.flops(batch) for batch in batches[0])
    seconds = flops / matmul_peak(device, DTYPES.get(precision, torch.float32)) / EFFICIENCY
    measured = seconds * (WARM_UP + STEPS) <= LONGEST_SECONDS
    if measured:
        with Work("measuring a step", WARM_UP + STEPS) as work:
            seconds = step_seconds(config, settings, (device, precision), batches, work)
    return _of_run(config, parts, seconds, world_size) | {"measured": measured}


def _device(accelerator: str) -> torch.device | None:
    try:
        device = choose_device("cpu" if accelerator == "cpu" else "auto")
    except UserError:
        return None
    return device if device.type == accelerator else None


def _of_run(config: TrainConfig, parts: Parts, seconds: float, world_size: int) -> dict:
    """With validations shared by the ranks, as the steps are."""
    schedule = parts.steps_per_epoch(config.train_batch_size) * config.epochs
    steps = min(schedule, config.max_steps or schedule)
    model, validations = parts.module.model, budget.Validations(config, parts)
    read = 0
    if len(parts.eval_set):
        read = (times_due(0, steps, config.eval_interval) - 1) * validations.tokens(0) + validations.tokens(steps)
    price = budget.token_cost(model.writing, model.codec.radix, validations.levels)
    validating = seconds * read * price / budget.tokens_per_step(config, parts)
    return {"step_seconds": seconds, "seconds": seconds * steps + validating, "validation_seconds": validating}


def first_batches(parts: Parts, settings: dict, world_size: int) -> list[list[Batch]]:
    """The micro-batches of the first rank in the first steps."""
    size, accumulation = settings["train_batch_size"], settings["gradient_accumulation_steps"]
    sampler = TrainBatchSampler(parts.train_set.lengths, size, parts.batch_maker.seed, mixture=parts.train_set.mixture)
    steps = []
    for number, indices in enumerate(sampler.batches(0)[: WARM_UP + STEPS]):
        positions = number * size + np.arange(len(indices))
        cuts = partition(len(indices), world_size, accumulation, 0)
        steps.append([parts.batch_maker(parts.train_set, indices[cut], positions[cut], 0) for cut in cuts])
    return steps


def step_seconds(
    config: TrainConfig, settings: dict, how: tuple[torch.device, str], batches: list[list[Batch]], work: Work
) -> float:
    """The median of real steps, without the engine, which costs little beside them. how: device and precision."""
    device, precision = how
    module = assemble(config, OnlyRank(), None).module.to(device)
    if precision in ("bf16", "fp16"):
        module = module.to(DTYPES[precision])
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(names, settings["optimizer"], config.ema_decay)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "torch_autocast")
    seconds = []
    for micro_batches in batches:
        begun = time.perf_counter()
        for micro_batch in micro_batches:
            with autocast:
                outputs = module(micro_batch.to(device))
            (outputs["loss_sum"] / max(1, module.count(micro_batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
        float(outputs["loss_sum"].detach())  # waits for an accelerator
        seconds.append(time.perf_counter() - begun)
        work.advance()
    return median(seconds[WARM_UP:] or seconds)
