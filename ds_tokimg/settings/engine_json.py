"""Reads `ds_config.json`, fills its "auto" values and finds contradictions before DeepSpeed sees it.

The JSON owns batch sizes, precision, ZeRO, clipping, optimiser, schedule and monitoring. A command-line flag
fills a value that the JSON leaves "auto" (or leaves out); where the JSON has another explicit value, that is
an error which names both. No torch, no deepspeed: the engine tells what the machine can do (`Machine`).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ds_tokimg.errors import UserError, raise_problems
from ds_tokimg.settings.config import DEFAULT_MAX_GRAD_NORM, TrainConfig
from ds_tokimg.settings.engine_schema import (
    AUTO,
    COUNT,
    MASTERS_IN_HALF,
    NUMBER,
    POSITIVE,
    PRECISIONS,
    SCHEDULERS,
    check,
    fits,
    lookup,
    offload_device,
)
from ds_tokimg.settings.files import write_text

# In a checkout a link to the file in the repository's root, which users edit; installed, a copy of it.
SHIPPED = Path(__file__).with_name("ds_config.json")
# A batch size's key in the JSON and the flag that fills it.
BATCH_FLAGS = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
DEEPEST = 20  # nesting; DeepSpeed's own keys stand 3 deep
SHORTEST_SCHEDULE = 3  # DeepSpeed warms up for at least 2 steps, and the schedule must be longer than that

QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
BUCKET_SIZE = "zero_optimization.reduce_bucket_size"
# Elements of gradients that a CPU reduces at once. DeepSpeed's 500 M would hold all of them a second or third time, and
# with 2 ranks a JiT-S/4 took 25 % more memory; there is no launch of a kernel to save.
CPU_BUCKET_SIZE = 5_000_000


@dataclass(frozen=True)
class Machine:
    """What a run has at its disposal: ranks, the accelerator's name ("cpu", "cuda", ...), its precisions."""

    world_size: int
    accelerator: str
    bf16: bool
    fp16: bool


def read(path: str | Path) -> dict:
    """The JSON as written. UserError if it is missing, is not JSON, repeats a key, or is not an object.

    The shipped file serves when the working folder has no `ds_config.json`.
    """
    place = Path(path)
    if str(path) == SHIPPED.name and not place.exists():
        place = SHIPPED
    try:
        raw = json.loads(place.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"--deepspeed_config {path}: not valid JSON at {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed_config {path}: {error}") from None
    if _is_deeper(raw, DEEPEST):
        raise UserError(f"--deepspeed_config {path}: objects and lists stand more than {DEEPEST} deep in each other")
    if not isinstance(raw, dict):
        raise UserError(f"--deepspeed_config {path}: expected an object {{...}}, found {type(raw).__name__}")
    return raw


def save(resolved: dict, path: str | Path) -> None:
    """Write a resolved JSON."""
    write_text(path, json.dumps(resolved, indent=2))


def _is_deeper(value: object, depth: int) -> bool:
    inside = [value]
    for _ in range(depth):
        parts = [one.values() if isinstance(one, dict) else one for one in inside if isinstance(one, dict | list)]
        inside = [one for part in parts for one in part]
    return any(isinstance(one, dict | list) for one in inside)


def _unique(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"these keys stand twice in one object: {', '.join(twice)}")
    return dict(pairs)


def solve_batch(
    train: int | None, micro: int | None, accumulation: int | None, world_size: int, default: int
) -> tuple[int, int, int]:
    """(train batch, micro-batch, accumulation) from what is given.

    A train batch is what it is on any number of ranks. Where the micro-batch is left open it is the largest share of a
    rank, and some get less, or nothing (`data.order.partition`). With neither of them given, the train batch is the
    default. A micro-batch alone is not accumulated.

    Raises UserError if `train = micro * accumulation * world_size` cannot hold with the micro-batch that is given.
    """
    if micro is None:
        train = train or default
        accumulation = accumulation or 1
        return train, math.ceil(train / (accumulation * world_size)), accumulation
    unit = world_size * micro * (accumulation or 1)  # the train batch is a multiple of this
    train = train or unit
    steps = accumulation or train // unit
    if train != micro * steps * world_size:
        below = train // unit * unit
        fits_in = f"{below} or {below + unit}" if below and not accumulation else str(unit)
        raise UserError(
            f"train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation or '?'} x {world_size} ranks: "
            f"a train batch of {fits_in} would fit"
        )
    return train, micro, steps


def resolve_batch(
    raw: dict, config: TrainConfig, world_size: int, resumed_train_batch: int | None = None
) -> tuple[int, int, int]:
    """(train batch, micro-batch, accumulation) of the JSON and the flags; UserError listing what contradicts.

    `resumed_train_batch`: that of the checkpoint to resume. It fixes the order of the data, so it stays.
    """
    resolution = _Resolution(raw, config, Machine(world_size, "cpu", bf16=True, fp16=True))
    batch = resolution.batch(resumed_train_batch)
    raise_problems("the batch sizes cannot be used:", resolution.problems)
    return batch


def resolve(
    raw: dict,
    config: TrainConfig,
    machine: Machine,
    steps_per_epoch: Callable[[int], int],
    resumed_train_batch: int | None = None,
) -> tuple[dict, list[str]]:
    """The JSON of a run, with no "auto" left, and notes on what was decided or has no effect.

    Its train batch is the run's, which ranks need not share evenly: the engine tells DeepSpeed one that they do.
    `steps_per_epoch`: optimiser steps of one epoch at a given train batch. Raises one UserError that lists
    every mistake of the JSON and every contradiction with the flags. `raw` stays as it is.
    """
    resolution = _Resolution(raw, config, machine)
    resolution.problems += check(raw)
    batch = resolution.batch(resumed_train_batch)
    resolution.optimizer()
    resolution.zero(resolution.precision())
    if batch is not None:
        resolution.schedule(steps_per_epoch(batch[0]) * (config.epochs or 1))
    resolution.monitors()
    unused = leftovers(raw, resolution.resolved)
    problems = resolution.problems + (unused if resolution.problems else [])
    raise_problems(f"{config.deepspeed_config} and the flags cannot be used:", problems)
    return resolution.resolved, [*resolution.notes, *unused]


class _Resolution:
    """The JSON while its "auto" values are filled, with the problems and notes found on the way.

    Values of a wrong kind are reported by `check` and count as not given here.
    """

    def __init__(self, raw: dict, config: TrainConfig, machine: Machine):
        self.raw, self.config, self.machine = raw, config, machine
        self.resolved = copy.deepcopy(raw)
        self.problems: list[str] = []
        self.notes: list[str] = []

    def given(self, path: str, kind):
        """The explicit value at `path`, or None."""
        value = lookup(self.raw, path)
        return value if value != AUTO and fits(value, kind) else None

    def put(self, path: str, value) -> None:
        """Write a value into the resolved JSON, making the blocks it needs."""
        *blocks, key = path.split(".")
        place = self.resolved
        for block in blocks:
            place = place.setdefault(block, {})
            if not isinstance(place, dict):
                return  # reported by check
        place[key] = value

    def fill(self, path: str, kind, flag: str, default=None):
        """The value at `path`: the JSON's, else the flag's, else the default. Two different ones contradict."""
        stated, wanted = self.given(path, kind), getattr(self.config, flag)
        if stated is not None and wanted is not None and stated != wanted:
            self.problems.append(
                f'{path} is {stated} in the JSON and --{flag} is {wanted}: drop the flag or write "auto" there'
            )
        value = next((one for one in (stated, wanted, default) if one is not None), None)
        if value is not None:
            self.put(path, value)
        return value

    def batch(self, resumed: int | None) -> tuple[int, int, int] | None:
        """The batch triple, or None with the problem noted."""
        known = len(self.problems)
        train, micro, accumulation = (self.fill(path, COUNT, flag) for path, flag in BATCH_FLAGS.items())
        if resumed is not None and train not in (None, resumed):
            self.problems.append(
                f"train_batch_size is {train} and the checkpoint was trained with {resumed}: resume with {resumed}"
            )
        if len(self.problems) > known:
            return None
        try:
            default = self.config.smallest_train_batch
            batch = solve_batch(resumed or train, micro, accumulation, self.machine.world_size, default)
        except UserError as error:
            self.problems.append(str(error))
            return None
        for path, value in zip(BATCH_FLAGS, batch, strict=True):
            self.put(path, value)
        return batch

    def optimizer(self) -> None:
        """Learning rate, clipping, and what DeepSpeed asks of an optimiser that is not its own."""
        self.fill("optimizer.params.lr", POSITIVE, "lr", self.config.lr_at_width_192)
        self.fill("gradient_clipping", NUMBER, "max_grad_norm", DEFAULT_MAX_GRAD_NORM)
        self.put("zero_allow_untested_optimizer", True)
        if offload_device(self.raw):
            self.put("zero_force_ds_cpu_optimizer", False)

    def precision(self) -> str | None:
        """The block that is switched on ("bf16", "fp16" or "torch_autocast"), or None for fp32."""
        states = {name: lookup(self.raw, f"{name}.enabled") for name in PRECISIONS}
        chosen = next((name for name, state in states.items() if state is True), None)
        if chosen is not None:
            self._check_stated_precision(chosen)
        else:
            chosen = self._automatic_precision([name for name, state in states.items() if state == AUTO])
        for name in PRECISIONS:
            if name in self.raw:
                self.put(f"{name}.enabled", name == chosen)
        if chosen == "torch_autocast":
            self.put("torch_autocast.dtype", self._autocast_dtype())
        return chosen

    def _check_stated_precision(self, chosen: str) -> None:
        if self.config.use_amp is False:
            self.problems.append(f"{chosen}.enabled is true in the JSON and --no_use_amp asks for fp32: drop one")
        if not self._supports(chosen):
            self.problems.append(f"{chosen}.enabled is true, but {self.machine.accelerator} cannot compute in it here")

    def _automatic_precision(self, open_blocks: list[str]) -> str | None:
        """Half precision on accelerators and where --use_amp asks for it: bfloat16 before float16."""
        on_accelerator = self.machine.accelerator != "cpu"
        if not (on_accelerator if self.config.use_amp is None else self.config.use_amp):
            return None
        usable = [name for name in open_blocks if self._supports(name)]
        if self.config.use_amp and not usable:
            self.problems.append(
                '--use_amp has nothing to switch on: give "bf16" or "fp16" of the JSON "enabled": "auto" '
                f"(this machine, {self.machine.accelerator}, has {self._precisions()})"
            )
        return usable[0] if usable else None

    def _precisions(self) -> str:
        names = [name for name in ("bf16", "fp16") if getattr(self.machine, name)]
        return " and ".join(names) or "neither"

    def _supports(self, block: str) -> bool:
        if block == "torch_autocast":
            return self.machine.bf16 if self._autocast_dtype() == "bfloat16" else self.machine.fp16
        return getattr(self.machine, block)

    def _autocast_dtype(self) -> str:
        stated = self.given("torch_autocast.dtype", ("bfloat16", "float16"))
        return stated or ("bfloat16" if self.machine.bf16 else "float16")

    def zero(self, precision: str | None) -> None:
        """The ZeRO stage. Stage 0 keeps no fp32 master weights, so bf16 and fp16 train right from stage 1 on."""
        path, half = "zero_optimization.stage", precision in ("bf16", "fp16")
        stage = self.given(path, (0, 1, 2, 3))
        if stage is None:
            automatic = lookup(self.raw, path) == AUTO
            stage = 1 if automatic and (half or self.machine.world_size > 1) else 0
        if stage == 0 and half:
            self.notes.append(f"{path} 0 has no fp32 master weights for {precision}: running as stage 1")
            stage = 1
        self.put(path, stage)
        for key in MASTERS_IN_HALF if stage == 0 else ():
            if lookup(self.raw, key) is True:
                self.problems.append(f"{key} needs {path} 1, 2 or 3")
        if stage > 0 and self.machine.accelerator == "cpu" and lookup(self.raw, BUCKET_SIZE) is None:
            self.put(BUCKET_SIZE, CPU_BUCKET_SIZE)
        for key in QUANTISED:
            if self.machine.accelerator == "cpu" and lookup(self.raw, f"zero_optimization.{key}") is True:
                self.problems.append(
                    f"zero_optimization.{key} true: needs kernels of an accelerator, which a CPU has not"
                )
        if stage > 0 and precision == "torch_autocast" and self._autocast_dtype() == "float16":
            self.problems.append(
                f"torch_autocast in float16 clips the scaled gradients at {path} {stage}: use bfloat16 or fp16"
            )

    def schedule(self, run_steps: int) -> None:
        """Total and warm-up steps of the schedule, and a peak that agrees with the optimiser's."""
        known = SCHEDULERS.get(str(lookup(self.raw, "scheduler.type")), {})
        if "scheduler" not in self.raw:
            self.notes.append("scheduler: none, the learning rate stays constant")
        stated_total = self.given("scheduler.params.total_num_steps", COUNT)
        stated_warmup = self.given("scheduler.params.warmup_num_steps", COUNT)
        total = stated_total or max(run_steps, SHORTEST_SCHEDULE, (stated_warmup or 0) + 1)
        warmup = stated_warmup or min(max(2, round(self.config.warmup_ratio * total)), total - 1)
        if "total_num_steps" in known:
            self.put("scheduler.params.total_num_steps", total)
            if total != run_steps:
                self.notes.append(f"scheduler: {total} steps long, and the run has {run_steps}")
            if total < SHORTEST_SCHEDULE or warmup >= total:
                self.problems.append(
                    f"scheduler.params.total_num_steps {total} must be more than the warm-up's {max(warmup, 2)}"
                )
        if known:
            self.put("scheduler.params.warmup_num_steps", warmup)
        if "warmup_max_lr" in known:
            self._schedule_peak()

    def _schedule_peak(self) -> None:
        """`warmup_max_lr` replaces the optimiser's learning rate silently: both must say the same."""
        rate = lookup(self.resolved, "optimizer.params.lr")
        peak = self.given("scheduler.params.warmup_max_lr", POSITIVE) or rate
        if peak != rate:
            self.problems.append(
                f"scheduler.params.warmup_max_lr is {peak} and optimizer.params.lr is {rate}: delete warmup_max_lr"
            )
        self.put("scheduler.params.warmup_max_lr", peak)

    def monitors(self) -> None:
        """Where TensorBoard and CSV files are written; packages that a monitor needs and that are not installed."""
        for block, folder in (("tensorboard", "tensorboard"), ("csv_monitor", "csv")):
            if isinstance(self.raw.get(block), dict):
                for key, value in (("output_path", self.config.output_dir), ("job_name", folder)):
                    self.put(f"{block}.{key}", self.given(f"{block}.{key}", "text") or value)
        packages = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
        for block, package in packages.items():
            if lookup(self.raw, f"{block}.enabled") is True and importlib.util.find_spec(package) is None:
                self.problems.append(f"{block}.enabled needs `pip install {package}`, or make it false")


def leftovers(raw: dict, resolved: dict) -> list[str]:
    """Values of a JSON that change nothing in the run it was resolved for, one sentence each."""
    stage = lookup(resolved, "zero_optimization.stage")
    notes = [f"{key}: has no effect, {why}" for key, why in _NO_EFFECT.items() if key in resolved]
    for block in PRECISIONS:
        keys = sorted(_keys_of(resolved, block) - {"enabled"})
        if keys and lookup(raw, f"{block}.enabled") in (None, False):
            notes.append(f"{block}.{', '.join(keys)}: no effect while {block} is off")
    zero = sorted(_keys_of(resolved, "zero_optimization") - {"stage"})
    unused = [key for key in zero if stage == 0 or (stage != 3 and key.startswith("stage3_"))]
    if unused and lookup(raw, "zero_optimization.stage") != AUTO:
        notes.append(f"zero_optimization.{', '.join(unused)}: no effect at stage {stage}")
    return notes


def _keys_of(resolved: dict, block: str) -> set[str]:
    return set(resolved[block]) if isinstance(resolved.get(block), dict) else set()


_LOADER = "the trainer has its own data loader"
_NO_EFFECT = {
    "dataloader_drop_last": _LOADER,
    "data_efficiency": _LOADER,
    "vocabulary_size": "the tokenizer decides",
    "pipeline": "the model is not cut into pipeline stages",
    "autotuning": "only the launcher's --autotuning reads it",
    "activation_checkpointing": "use the flag --activation_checkpointing",
    "hybrid_engine": "the samplers need no generation engine",
    "datastates_ckpt": "the trainer writes checkpoints itself",
}
