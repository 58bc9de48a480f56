"""The figures of a plan: what a run would do with its data and its memory, from its own parts, without its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ds_tokimg.data.batch import Batch
from ds_tokimg.data.order import TrainBatchSampler, partition
from ds_tokimg.engine.muon import hidden_matrices
from ds_tokimg.engine.ranks import OnlyRank
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.engine_schema import PRECISIONS
from ds_tokimg.settings.unused import beyond_the_run
from ds_tokimg.training import automatic
from ds_tokimg.training import budget as validation_budget
from ds_tokimg.training.assemble import Parts, assemble, load_start
from ds_tokimg.training.duration import duration
from ds_tokimg.training.memory import (
    MOMENTS,
    STAGES,
    Footprint,
    activation_bytes,
    checkpoint_bytes,
    empty_weights,
    largest_micro_batch,
    rank_memory,
)

WORLD_SIZES = tuple(2**power for power in range(11))  # 1 ... 1024
# Samples whose batches are really made, to see how much of them is padding.
PADDING_SAMPLES = 2000
# Samples in the two micro-batches from which the growth of the activations is measured.
FEW, MANY = 4, 8


@dataclass
class Prepared:
    """A run before it begins: settings with all that was left open, parts with a model without weights, the engine's
    settings, what was decided, and what a person should know."""

    config: TrainConfig
    parts: Parts
    settings: dict
    decided: list[str]
    notes: list[str]


def prepare(config: TrainConfig, raw: dict, machine: engine_json.Machine) -> Prepared:
    """Puts a run together without its weights. `raw`: the engine's JSON.

    Raises UserError for everything that would keep the run from starting.
    """
    # Compiling takes time. Noise levels that follow the loss need numbers, and there are none.
    timesteps = "band" if config.timesteps == "entropic" else config.timesteps
    config = dataclasses.replace(config, compile=False, timesteps=timesteps)
    start = load_start(config)
    with empty_weights():
        parts = assemble(config, OnlyRank(), None, start)
    config, decided = automatic.decide(config, raw, parts.images, machine.world_size)
    settings, notes = engine_json.resolve(raw, config, machine, parts.steps_per_epoch)
    config = dataclasses.replace(config, train_batch_size=settings["train_batch_size"])
    config, read = validation_budget.decide(config, parts)
    notes = [*parts.notes, *notes, *parts.not_as_asked(config)]
    return Prepared(config, parts, settings, [*decided, *read], notes)


def make_plan(
    config: TrainConfig, raw: dict, machine: engine_json.Machine, budget: float | None = None, timed: bool = False
) -> dict:
    """The whole plan as JSON values. Memory is in bytes per rank, tokens and steps are counts.

    budget: bytes of a rank's memory, to find the largest micro-batch that fits. timed: with the time of a run here.

    Raises UserError for everything that would keep the run from starting.
    """
    # Which colours the tokens get changes no size, and learning them takes time.
    run = prepare(config if config.init_from else dataclasses.replace(config, palette="id"), raw, machine)
    config, parts, settings = run.config, run.parts, run.settings
    steps = config.epochs * parts.steps_per_epoch(config.train_batch_size)
    notes = [*run.notes, *automatic.short_schedule(steps, config), *beyond_the_run(config, steps)]
    clock = duration(config, parts, settings, machine.world_size, machine.accelerator) if timed else None
    if timed and clock is None:
        notes.append(f"how long a step takes is not known: this machine has no {machine.accelerator} to measure it on")
    footprint = _footprint(config, parts, settings, machine)
    return {
        "data": _data(parts, settings, machine.world_size),
        "model": _model(config, parts, footprint),
        "batch": _batch(parts, settings, machine.world_size),
        "schedule": _schedule(config, parts, settings),
        "engine": _engine(settings, machine),
        "memory": _memory(footprint, settings, machine, budget),
        "time": clock,
        "checkpoint_bytes": checkpoint_bytes(footprint, settings["zero_optimization"]["stage"]),
        "recipe": config.recipe,
        "automatic": run.decided,
        "notes": notes,
        "settings": settings,
    }


def _data(parts: Parts, settings: dict, world_size: int) -> dict:
    train_set, eval_set = parts.train_set, parts.eval_set
    used = parts.steps_per_epoch(settings["train_batch_size"]) * settings["train_batch_size"]
    return {
        "documents": train_set.num_documents,
        "images": len(train_set),
        "images_left_out": max(0, len(train_set) - used),
        "eval_images": len(eval_set),
        "tokens": train_set.num_tokens,
        "bytes": train_set.num_bytes,
        "tokens_per_image": train_set.num_tokens / len(train_set),
        "max_tokens": train_set.max_tokens,
        "padding_fraction": padding_fraction(parts, settings, world_size),
    }


def padding_fraction(parts: Parts, settings: dict, world_size: int) -> float:
    """Share of the computed token places without a token, over all ranks: the first train batches are really made."""
    size, accumulation = settings["train_batch_size"], settings["gradient_accumulation_steps"]
    sampler = TrainBatchSampler(parts.train_set.lengths, size, parts.batch_maker.seed, mixture=parts.train_set.mixture)
    valid = places = 0
    for number, indices in enumerate(sampler.batches(0)[: max(1, PADDING_SAMPLES // size)]):
        positions = number * size + np.arange(len(indices))
        for rank in range(world_size):
            for part in partition(len(indices), world_size, accumulation, rank):
                mask = parts.batch_maker(parts.train_set, indices[part], positions[part], 0).mask
                valid, places = valid + int(mask.sum()), places + mask.numel()
    return 1 - valid / places


def _model(config: TrainConfig, parts: Parts, footprint: Footprint) -> dict:
    codec, model = parts.layout.codec, parts.module.model
    return {
        "name": config.model,
        "parameters": footprint.parameters,
        "patches": model.num_patches,
        "tokens_per_patch": model.slots,
        "vocab_size": codec.vocab_size,
        "token_size": codec.token_size,
        "radix": codec.radix,
    }


def _batch(parts: Parts, settings: dict, world_size: int) -> dict:
    size = settings["train_batch_size"]
    images = min(size, len(parts.train_set))
    return {
        "train_batch_size": size,
        "micro_batch": settings["train_micro_batch_size_per_gpu"],
        "accumulation": settings["gradient_accumulation_steps"],
        "world_size": world_size,
        "images_per_step": images,
        "tokens_per_step": round(parts.train_set.num_tokens / len(parts.train_set) * images),
    }


def _schedule(config: TrainConfig, parts: Parts, settings: dict) -> dict:
    steps = parts.steps_per_epoch(settings["train_batch_size"])
    params = settings.get("scheduler", {}).get("params", {})
    total = steps * config.epochs
    return {
        "epochs": config.epochs,
        "steps_per_epoch": steps,
        "steps": min(total, config.max_steps or total),
        "scheduler": settings.get("scheduler", {}).get("type"),
        "scheduler_steps": params.get("total_num_steps"),
        "warmup_steps": params.get("warmup_num_steps"),
    }


def _engine(settings: dict, machine: engine_json.Machine) -> dict:
    return {
        "accelerator": machine.accelerator,
        "precision": precision_of(settings),
        "zero_stage": settings["zero_optimization"]["stage"],
        "optimizer": settings["optimizer"]["type"],
        "lr": settings["optimizer"]["params"]["lr"],
        "gradient_clipping": settings["gradient_clipping"],
    }


def precision_of(settings: dict) -> str:
    return next((name for name in PRECISIONS if settings.get(name, {}).get("enabled")), "fp32")


def _footprint(config: TrainConfig, parts: Parts, settings: dict, machine: engine_json.Machine) -> Footprint:
    parameters = sum(p.numel() for p in parts.module.parameters() if p.requires_grad)
    moments = moments_of(settings["optimizer"], parts.module, parameters)
    parts.module.measure_bound = True  # as in the steps that are logged, which need the most
    parts.module.schedule = None  # it looks at values, which tensors without data have not; all its sums are small
    small, large = (longest_batch(parts, samples) for samples in (FEW, MANY))
    fixed, per_sample = activation_bytes(parts.module, small, large, precision_of(settings))
    return Footprint(
        parameters=parameters,
        precision=precision_of(settings),
        moments=moments,
        averages=int(config.ema_decay > 0),
        zero=settings["zero_optimization"],
        on_cpu=machine.accelerator == "cpu",
        fixed=fixed,
        per_sample=per_sample,
        accumulation=settings["gradient_accumulation_steps"],
    )


def moments_of(optimizer: dict, module, parameters: int) -> float:
    kind = optimizer["type"]
    if kind == "Muon":  # one for matrices, two for the rest
        return MOMENTS[kind] - sum(p.numel() for p in hidden_matrices(module.parameters())) / parameters
    return MOMENTS[kind] + (optimizer["params"].get("momentum", 0) > 0)


def longest_batch(parts: Parts, samples: int) -> Batch:
    """A micro-batch of the samples with the most patches, conditions included."""
    train_set, layout = parts.train_set, parts.layout
    patches = layout.num_patches(train_set.lengths) + layout.num_patches(train_set.prompt_lengths)
    longest = np.resize(np.argsort(-patches, kind="stable")[:samples], samples)
    return parts.batch_maker(train_set, longest, np.arange(samples), 0)


def _memory(footprint: Footprint, settings: dict, machine: engine_json.Machine, budget: float | None) -> dict:
    micro_batch = settings["train_micro_batch_size_per_gpu"]
    activations = footprint.activations(micro_batch)
    stages = []
    for stage in STAGES:
        memory = rank_memory(footprint, stage, machine.world_size)
        if memory is None:
            continue
        row = {"stage": stage, **dataclasses.asdict(memory), "activations": activations}
        row["total"] = memory.total(activations)
        if budget is not None:
            row["largest_micro_batch"] = largest_micro_batch(footprint, memory, budget)
        stages.append(row)
    totals = {
        world_size: {
            row["stage"]: rank_memory(footprint, row["stage"], world_size).total(activations) for row in stages
        }
        for world_size in WORLD_SIZES
    }
    return {
        "micro_batch": micro_batch,
        "activations_fixed": footprint.fixed,
        "activations_per_sample": footprint.per_sample,
        "stages": stages,
        "total_by_world_size": totals,
        "budget": budget,
    }
