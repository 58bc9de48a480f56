"""Resident memory of real training steps beside what `plan` foretells, per rank.

    python -m benchmarks.memory > benchmarks/results/memory.md

Every case is a fresh set of ranks (gloo) that take two steps on the micro-batch of the longest texts, with which the
plan counts. Measured is the peak of a rank's resident memory minus what it held before the engine was made, plus the
weights that were there already: once with every freed tensor handed back to the system at once, which shows what is
needed, and (JiT-S/4) once with freed memory kept, as `train` does for speed on a CPU. Takes about ten minutes on one
core and at most 8 GB; `--part small` and `--part large` take half of it each.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import tempfile
from datetime import date
from pathlib import Path

from benchmarks import ROOT
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import train_config
from tests.support.distributed import run_ranks

STEPS = 2
STAGES = (0, 1, 2, 3)
DATA = ROOT / "data" / "web_narrative.txt"
PARTS = ("weights", "gradients", "optimizer", "averages", "buffers", "workspace", "activations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("small", "large", "all"), default="all")
    part = parser.parse_args().part
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of the ranks
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        if part != "large":
            print_head()
            for ranks in (1, 2, 4):
                title = f"JiT-S/4, 1,024 tokens an image, {ranks} rank(s)"
                print_table(title, ranks, flags("JiT-S/4", 1024, 2 * ranks), {"needed": False, "resident": True})
        if part != "small":
            for extra in ([], ["--activation_checkpointing"]):
                title = "JiT-B/4, 4,096 tokens an image, 1 rank" + (", activation checkpointing" if extra else "")
                print_table(title, 1, flags("JiT-B/4", 4096, 2) + extra, {"needed": False})


def flags(model: str, max_tokens: int, train_batch_size: int) -> list[str]:
    return (
        f"--data_path {DATA} --model {model} --max_tokens {max_tokens} --train_batch_size {train_batch_size} "
        "--vocab_size 4096 --palette id"
    ).split()


HEAD = """\
MB per rank. Predicted is the plan's total: the larger of what a backward begins with (weights, optimizer, averages,
buffers, activations; the gradients too where they are accumulated, and at stage 3) and of what the update needs (all
but buffers and activations, and the workspace). Needed is the measured peak of the rank that needed most, without
libraries and data. Resident is the same as `train` runs on a CPU: it keeps freed memory for speed, and the heap has
holes, the more of it the smaller the pieces are that ZeRO cuts."""


def print_head() -> None:
    cores = len(os.sched_getaffinity(0))
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line).split(": ")[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    print("# Memory\n")
    print(f"`python -m benchmarks.memory`, {date.today()}, commit {commit.strip()}, {model}, {cores} core(s), ", end="")
    print(f"Python {platform.python_version()}, fp32 on gloo, micro-batch 2, one averaged copy of the weights.\n")
    print(HEAD)


def print_table(title: str, ranks: int, arguments: list[str], ways: dict[str, bool]) -> None:
    """`ways`: names of measurements, and whether freed memory is kept in them."""
    plan = run_ranks(1, forecast, arguments, ranks, timeout=300)[0]
    columns = [*PARTS, "predicted", *ways, *(f"{name} / predicted" for name in ways)]
    print(f"\n## {title}\n\n{plan['model']['parameters'] / 1e6:.1f} M parameters\n")
    print(f"| ZeRO stage | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for row in plan["memory"]["stages"]:
        measured = [
            max(run_ranks(ranks, measure, arguments, row["stage"], keep, timeout=600)) for keep in ways.values()
        ]
        cells = [row[part] / 1e6 for part in PARTS] + [row["total"] / 1e6, *(value / 1e6 for value in measured)]
        ratios = [f"{value / row['total']:.2f}" for value in measured]
        print(f"| {row['stage']} | {' | '.join([f'{cell:,.0f}' for cell in cells] + ratios)} |", flush=True)


def settings_of(stage: int) -> dict:
    """The shipped JSON at a ZeRO stage."""
    return json.loads((ROOT / "ds_config.json").read_text()) | {"zero_optimization": {"stage": stage}}


def forecast(dist, arguments: list[str], ranks: int) -> dict:
    """The plan of a run of this many ranks."""
    from ds_tokimg.training.forecast import make_plan

    machine = engine_json.Machine(ranks, "cpu", bf16=False, fp16=False)
    return make_plan(train_config(arguments), settings_of(0), machine)


def measure(dist, arguments: list[str], stage: int, keep: bool) -> int:
    """Bytes that this rank needs for training at a ZeRO stage; `keep`: with the heap of `train`."""
    from ds_tokimg.engine.allocator import keep_freed_memory
    from ds_tokimg.engine.engine import TrainEngine, machine_capabilities
    from ds_tokimg.training.assemble import assemble
    from ds_tokimg.training.forecast import longest_batch

    if keep:
        keep_freed_memory()
    else:
        return_freed_memory()
    config = train_config(arguments)
    parts = assemble(config, dist, None)
    settings, _ = engine_json.resolve(settings_of(stage), config, machine_capabilities(), parts.steps_per_epoch)
    batch = longest_batch(parts, settings["train_micro_batch_size_per_gpu"])
    weights = sum(p.numel() * p.element_size() for p in parts.module.parameters())
    before = resident("VmRSS") - weights
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    engine = TrainEngine(parts.module, settings, config.ema_decay, dist)
    parts.module.measure_bound = True  # as in the steps that are logged
    for _ in range(STEPS):
        engine.train_batch([batch])
    return resident("VmHWM") - before


def return_freed_memory() -> None:
    """Every block of 64 KB or more is mapped by itself (glibc's M_MMAP_THRESHOLD), and unmapped when it is freed."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 65536)


def resident(name: str) -> int:
    """Bytes, by its name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    main()
