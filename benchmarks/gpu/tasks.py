"""What `benchmarks.gpu` measures, each in a process of its own: `python -m benchmarks.gpu.tasks TASK '{"option": …}'`.

A task prints one JSON object as its last line. On a CPU (DS_ACCELERATOR=cpu) each of them runs too.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.trainer import join
from ds_tokimg.data.loader import BatchLoader
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.engine.allocator import peak_memory
from ds_tokimg.engine.engine import TrainEngine, machine_capabilities
from ds_tokimg.model.flops import matmul_peak
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.training import automatic
from ds_tokimg.training.assemble import assemble
from ds_tokimg.training.forecast import longest_batch, make_plan

DATA = ROOT / "data" / "web_narrative.txt"
PRECISIONS: dict[str, dict] = {
    "fp32": {"bf16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}},
    # As many bits as the gradients of a small model need, so that no step is skipped.
    "fp16": {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 10}},
}
OVERFLOWING: dict = {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}}


class Trainer:
    """The parts of a run of these flags and its engine; `blocks` replace entries of the shipped JSON."""

    def __init__(self, flags: list[str], blocks: dict):
        self.dist = join()
        self.raw = engine_json.read(engine_json.SHIPPED) | {"tensorboard": {"enabled": False}} | blocks
        config = train_config(["--data_path", str(DATA), *flags])
        self.parts = assemble(config, self.dist, None)
        self.config, _ = automatic.decide(config, self.raw, len(self.parts.train_set), self.dist.world_size)
        self.machine = machine_capabilities()
        self.settings, _ = engine_json.resolve(self.raw, self.config, self.machine, self.parts.steps_per_epoch)
        self.engine = TrainEngine(self.parts.module, self.settings, self.config.ema_decay, self.dist)

    def batches(self, steps: int):
        """Micro-batches of the run's first steps."""
        size = self.settings["train_batch_size"]
        sampler = TrainBatchSampler(self.parts.train_set.lengths, size, self.config.seed)
        loaded = BatchLoader(self.parts.train_set, sampler, self.parts.batch_maker).batches(0, steps)
        return (each.micro_batches for each in loaded)


def facts() -> dict:
    """What machine this is."""
    dist = join()
    kind, device = dist.device.type, dist.device
    found: dict = {"kind": kind, "name": "this processor", "count": 1, "torch": torch.__version__}
    if kind != "cpu":
        module = torch.get_device_module(device)
        found |= {"name": module.get_device_name(device), "count": module.device_count()}
        found["memory"] = module.get_device_properties(device).total_memory
    machine = machine_capabilities()
    found |= {"bf16": machine.bf16, "fp16": machine.fp16}
    rates = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if machine.bf16 else {})
    return found | {"rates": {name: matmul_peak(device, dtype) for name, dtype in rates.items()}}


def losses(flags: list[str], precision: str, stage: int, steps: int) -> dict:
    """Of the first steps of a run."""
    trainer = Trainer(flags, PRECISIONS[precision] | {"zero_optimization": {"stage": stage}})
    found = [trainer.engine.train_batch(batch).loss for batch in trainer.batches(steps)]
    return {"losses": found, "skipped": trainer.engine.skipped_steps}


def loss_scale(flags: list[str], stage: int, steps: int) -> dict:
    """Of an fp16 run that starts with a scale that is far too large: it falls, and skipped steps leave the learning
    rate where it is."""
    trainer = Trainer(flags, OVERFLOWING | {"zero_optimization": {"stage": stage}})
    results = [trainer.engine.train_batch(batch) for batch in trainer.batches(steps)]
    skipped = [bool(result.skipped) for result in results]
    rates = [result.lr for result in results]
    held = all(after == before for before, after, skip in zip(rates, rates[1:], skipped, strict=False) if skip)
    moved = [after != before for before, after, skip in zip(rates, rates[1:], skipped, strict=False) if not skip]
    scales = [result.loss_scale for result in results]
    return {"skipped": sum(skipped), "first": scales[0], "last": scales[-1], "held": held and any(moved)}


def waits(flags: list[str]) -> dict:
    """Where a step makes the host wait for the accelerator: how often, by place."""
    trainer = Trainer(flags, {})
    batches = list(trainer.batches(6))
    for batch in batches[:3]:
        trainer.engine.train_batch(batch)
    if trainer.dist.device.type != "cuda":
        return {"known": False, "places": {}}
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for batch in batches[3:]:
            trainer.engine.train_batch(batch)
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = Path(warning.filename)
            places[f"{place.parent.name}/{place.name}:{warning.lineno}"] += 1
    return {"known": True, "places": {place: count / 3 for place, count in places.most_common()}}


def step(flags: list[str], images: int, repetitions: int, blocks: dict | None = None) -> dict:
    """Seconds of a step on full images, what it computes, and its memory beside the plan's."""
    trainer = Trainer([*flags, "--batch_size", str(images), "--gradient_accumulation_steps", "1"], blocks or {})
    device, module = trainer.dist.device, trainer.parts.module
    batch = longest_batch(trainer.parts, images)
    for _ in range(3):
        trainer.engine.train_batch([batch])
    _synchronise(device)
    seconds = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        trainer.engine.train_batch([batch])
        _synchronise(device)
        seconds.append(time.perf_counter() - begun)
    plan = make_plan(trainer.config, trainer.raw, trainer.machine)
    stage = plan["settings"]["zero_optimization"]["stage"]
    return {
        "seconds": seconds,
        "tokens": int(batch.mask.sum()),
        "flops": module.flops(batch),
        "rate": matmul_peak(device, trainer.engine.compute_dtype),
        "dtype": str(trainer.engine.compute_dtype).removeprefix("torch."),
        "memory": peak_memory(device),
        "planned": next(row["total"] for row in plan["memory"]["stages"] if row["stage"] == stage),
    }


def profile(flags: list[str], images: int) -> dict:
    """The ten kernels (operators on a CPU) of a step that take most of its time, and those of attention."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    trainer = Trainer([*flags, "--batch_size", str(images), "--gradient_accumulation_steps", "1"], {})
    device, batch = trainer.dist.device, longest_batch(trainer.parts, images)
    for _ in range(3):
        trainer.engine.train_batch([batch])
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with recorded(activities=kinds) as profiler:
        trainer.engine.train_batch([batch])
        _synchronise(device)
    events = profiler.key_averages()
    if device.type == "cuda":  # the kernels, not the operators that start them
        times = {e.key: e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA}
    else:
        times = {e.key: e.self_cpu_time_total for e in events}
    total = sum(times.values()) or 1
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    words = ("attention", "flash", "fmha", "sdpa")
    return {
        "top": [[name, share / total] for name, share in top],
        "attention": [[name, share / total] for name, share in times.items() if any(w in name.lower() for w in words)],
    }


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


TASKS = {task.__name__: task for task in (facts, losses, loss_scale, waits, step, profile)}

if __name__ == "__main__":
    found = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(found), flush=True)
