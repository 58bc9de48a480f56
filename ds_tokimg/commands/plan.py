"""python -m ds_tokimg plan: what a training run would do and need, without training.

Takes every flag of `train`. Reads the data, builds the model without its weights (forecast.py), resolves the engine's
JSON for a world size, and prints the batch, the schedule, the padding, and the memory of a rank at every ZeRO stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence

from ds_tokimg.commands.output import check_outputs, write_json
from ds_tokimg.console import clock, starting
from ds_tokimg.engine import environment
from ds_tokimg.engine.startup import quiet
from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import Parser, build_parser, parse, path
from ds_tokimg.settings.unused import unused_flags

GIGABYTE = 1e9


def main(argv: list[str]) -> int:
    config, arguments = parse(_parser(argv), argv)
    if config.resume is not None:
        raise UserError("plan shows a run from its first step: leave --resume out")
    raw = engine_json.read(config.deepspeed_config)
    check_outputs(arguments.json)
    with starting():
        machine = _machine(arguments)
        # Mistakes in the JSON are reported before the data is read.
        engine_json.resolve(raw, config, machine, lambda train_batch: 1)
        from ds_tokimg.training.forecast import make_plan

    memory = arguments.memory_gb and arguments.memory_gb * GIGABYTE
    report = make_plan(config, raw, machine, memory, timed=not arguments.no_timing)
    report["notes"] = [*unused_flags(config, argv), *report["notes"]]
    print(as_text(report))
    if arguments.json:
        write_json(arguments.json, report)
    return 0


def _parser(argv: Sequence[str] = ()) -> Parser:
    parser = build_parser("plan", "Show what a training run would do and need, without training.", argv)
    group = parser.add_argument_group("plan")
    group.add_argument("--world_size", type=int, metavar="N", help="ranks of the run (default: 1)")
    group.add_argument("--accelerator", choices=("cpu", "cuda"), help="plan for it (default: this machine's)")
    group.add_argument("--memory_gb", type=float, metavar="X", help="memory of a rank in GB, to find the micro-batch")
    group.add_argument("--no_timing", action="store_true", help="do not measure how long a step takes on this machine")
    group.add_argument("--json", type=path, metavar="FILE", help="write the plan there, in bytes and whole numbers")
    return parser


def _machine(arguments: argparse.Namespace) -> engine_json.Machine:
    """The machine to plan for. DeepSpeed is asked about this one alone."""
    world_size = arguments.world_size
    if world_size is None:
        world_size = environment.world_size()
    if world_size < 1:
        raise UserError(f"--world_size {world_size}: expected at least 1")
    if arguments.memory_gb is not None and not 0 < arguments.memory_gb < math.inf:
        raise UserError(f"--memory_gb {arguments.memory_gb}: expected a number above 0")
    if arguments.accelerator is not None:
        return engine_json.Machine(world_size, arguments.accelerator, bf16=True, fp16=arguments.accelerator == "cuda")
    with quiet():
        from ds_tokimg.engine.engine import machine_capabilities

    return dataclasses.replace(machine_capabilities(), world_size=world_size)


def as_text(plan: dict) -> str:
    """The plan as a person reads it."""
    data, model, batch, schedule, engine = (plan[key] for key in ("data", "model", "batch", "schedule", "engine"))
    left_out = f" ({data['images_left_out']:,} left out of an epoch)" if data["images_left_out"] else ""
    warmup = f", warm-up {schedule['warmup_steps']:,}" if schedule["warmup_steps"] else ""
    lines = [
        f"recipe      {plan['recipe']}",
        *([f"automatic   {', '.join(plan['automatic'])}"] if plan["automatic"] else []),
        f"data        {data['documents']:,} documents, {data['bytes']:,} bytes, {data['tokens']:,} tokens",
        f"images      {data['images']:,} to train on{left_out}, {data['eval_images']:,} held out; "
        f"{data['tokens_per_image']:.1f} of {data['max_tokens']:,} tokens an image",
        f"padding     {data['padding_fraction']:.1%} of the computed token places",
        f"model       {model['name']}: {model['parameters']:,} parameters, {model['patches']:,} patches of "
        f"{model['tokens_per_patch']:,} tokens; {model['vocab_size']:,} token ids in {model['radix']} levels a channel",
        f"batch       {batch['train_batch_size']:,} = {batch['micro_batch']:,} micro-batch x "
        f"{batch['accumulation']:,} accumulation x {batch['world_size']:,} ranks",
        f"step        {batch['images_per_step']:,} images, {batch['tokens_per_step']:,} tokens",
        f"schedule    {schedule['steps_per_epoch']:,} steps an epoch x {schedule['epochs']:,} epochs, "
        f"{schedule['steps']:,} steps to run{warmup}, {schedule['scheduler'] or 'constant'}",
        f"engine      {engine['precision']} on {engine['accelerator']}, ZeRO stage {engine['zero_stage']}, "
        f"{engine['optimizer']} at {engine['lr']:g}, clipping at {engine['gradient_clipping']:g}",
        f"checkpoint  {_gigabytes(plan['checkpoint_bytes'])} GB",
        *_time_lines(plan["time"], batch["world_size"]),
        "",
        *_memory_lines(plan["memory"], batch["world_size"]),
    ]
    if plan["notes"]:
        lines += ["", *(f"note: {note}" for note in plan["notes"])]
    return "\n".join(lines)


def _time_lines(time: dict | None, world_size: int) -> list[str]:
    if time is None:
        return []
    how = "measured" if time["measured"] else "estimated from its operations: half of this machine's rate"
    ranks = "" if world_size == 1 else f"on {world_size:,} machines like this one, "
    share = time["validation_seconds"] / time["seconds"]
    return [
        f"time        {ranks}about {clock(time['seconds'])}, {share:.1%} of it validation, without loading and saving; "
        f"a step {time['step_seconds']:.3g} s ({how})"
    ]


def _memory_lines(memory: dict, world_size: int) -> list[str]:
    columns = ("weights", "gradients", "optimizer", "averages", "buffers", "activations", "total")
    host = any(row["host"] for row in memory["stages"])
    columns += ("host",) if host else ()
    lines = [
        f"GB per rank on {world_size:,} ranks, micro-batch {memory['micro_batch']:,} of the longest texts "
        f"(each sample {_gigabytes(memory['activations_per_sample'])} GB of activations)",
        _row("stage", columns),
        *(_row(row["stage"], (_gigabytes(row[column]) for column in columns)) for row in memory["stages"]),
        "",
        "GB per rank in all, by number of ranks (same micro-batch)",
        _row("ranks", (f"stage {row['stage']}" for row in memory["stages"])),
    ]
    for ranks, totals in memory["total_by_world_size"].items():
        lines.append(_row(ranks, (_gigabytes(total) for total in totals.values())))
    if memory["budget"] is not None:
        fits = ", ".join(f"{row['largest_micro_batch']:,} at stage {row['stage']}" for row in memory["stages"])
        lines += ["", f"largest micro-batch in {memory['budget'] / GIGABYTE:g} GB: {fits}"]
    return lines


def _row(head, cells) -> str:
    return f"{head:>6}" + "".join(f"{cell:>13}" for cell in cells)


def _gigabytes(size: float) -> str:
    """Bytes as GB with three digits that matter."""
    value = size / GIGABYTE
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
