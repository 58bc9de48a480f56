"""Is it right? Losses, runs and ranks on the accelerator beside those on the CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks import ROOT
from benchmarks.gpu.check import DATA, Check
from benchmarks.proof import weight_files

STEPS = 20
# How far the losses of these steps may be from those of fp32 on a CPU, as a share: rounding, and what it grows to.
ALLOWED = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
SMALL = "--model JiT-XS/4 --max_tokens 64 --vocab_size 300 --train_batch_size 8 --seed 1".split()


def verdict(fine: bool) -> str:
    return "ok" if fine else "FAILED"


def largest_deviation(values: Sequence[float], reference: Sequence[float]) -> float:
    """As a share of the reference; what is not finite counts as infinite."""
    shares = np.abs(np.asarray(values) - np.asarray(reference)) / np.abs(reference)
    return float(np.nan_to_num(shares, nan=np.inf).max())


def compare_losses(check: Check) -> None:
    flags = [*SMALL, "--lr", "1e-3", "--epochs", "1"]
    title = f"Losses of {STEPS} steps beside the CPU's in fp32"
    check.title(title, "precision", "ZeRO", "largest deviation", "allowed", "")
    reference: list[float] = []

    def of_cpu() -> list[tuple]:
        reference.extend(check.task("losses", True, flags=flags, precision="fp32", stage=0, steps=STEPS)["losses"])
        return []

    def compare(precision: str, stage: int) -> list[tuple]:
        found = check.task("losses", flags=flags, precision=precision, stage=stage, steps=STEPS)
        deviation, allowed = largest_deviation(found["losses"], reference), ALLOWED[precision]
        return [(f"{deviation:.1e}", f"{allowed:.0e}", verdict(deviation <= allowed and not found["skipped"]))]

    check.rows(("fp32", "on the CPU"), of_cpu)
    if not reference:
        return
    kinds = [kind for kind in ALLOWED if check.machine.get(kind, True)]
    for kind in kinds:
        for stage in (1,) if check.dry else range(4):
            check.rows((kind, stage), partial(compare, kind, stage))
    if "fp16" in kinds:
        compare_loss_scales(check, flags)


def compare_loss_scales(check: Check, flags: list[str]) -> None:
    title = "fp16 with a loss scale that is too large"
    check.title(title, "ZeRO", "skipped", "scale", "the learning rate waits", "")
    steps = 3 * STEPS

    def measure(stage: int) -> list[tuple]:
        found = check.task("loss_scale", flags=flags, stage=stage, steps=steps)
        fine = found["held"] and found["last"] < found["first"] and 0 < found["skipped"] < steps
        scale = f"{found['first']:.0f} to {found['last']:.0f}"
        return [(f"{found['skipped']} of {steps}", scale, found["held"], verdict(fine))]

    for stage in (0, 2):
        check.rows((stage,), partial(measure, stage))


def compare_runs(check: Check) -> None:
    """Two runs of 12 steps, one here and one on the CPU, each resumed from its step 6, here or there."""
    intervals = "--max_steps 12 --save_interval 6 --eval_interval 6 --log_interval 1 --epochs 1 --eval_tokens 500"
    flags = [*SMALL, *intervals.split(), "--deepspeed_config", str(fp32_json(check))]
    runs: dict[str, Path] = {}

    def begin(place: str) -> list[tuple]:
        runs[place] = check.train(f"whole_{place}", *flags, on_cpu=place == "on the CPU")
        return []

    def resume(begun: str, ended: str, allowed: float) -> list[tuple]:
        checkpoint = runs[begun] / "checkpoints" / "step_00000006"
        name = f"resumed {begun} {ended}".replace(" ", "_")
        run = check.train(name, *flags, "--resume", str(checkpoint), on_cpu=ended == "on the CPU")
        return [compare_run(runs[begun], run, allowed)]

    head = ("losses of steps 7 to 12", "weights", "averages", "held-out bits")
    check.title("Runs of 12 steps in fp32, resumed from step 6", "compared with the whole run", *head, "")
    places = ("here", "on the CPU")
    for place in places:
        check.rows((f"whole, {place}",), partial(begin, place))
    if len(runs) < len(places):
        return
    ways = [("on the CPU", "here", 1e-3), ("here", "on the CPU", 1e-3), ("here", "here", 1e-5)]
    for begun, ended, allowed in ways[:1] if check.dry else ways:
        check.rows((f"begun {begun}, resumed {ended}",), partial(resume, begun, ended, allowed))
    check.rows(("whole, here and on the CPU",), lambda: [compare_run(runs["on the CPU"], runs["here"], 1e-3)])
    use_model(check, runs["here"])


def fp32_json(check: Check) -> Path:
    """The shipped JSON without half precision."""
    path = check.folder / "fp32.json"
    path.write_text(json.dumps(json.loads((ROOT / "ds_config.json").read_text()) | {"bf16": {"enabled": False}}))
    return path


def compare_run(run: Path, other: Path, allowed: float) -> tuple:
    """Losses, weights, averages and held-out bits of the last six steps of two runs, and a verdict on them."""
    rows, others = metrics(run)[-6:], metrics(other)[-6:]
    loss = largest_deviation([row["loss"] for row in others], [row["loss"] for row in rows])
    bits = largest_deviation([others[-1]["val_bits_per_token"]], [rows[-1]["val_bits_per_token"]])
    files, other_files = weight_files(run), weight_files(other)
    averages, trained = (weight_distance(files[name], other_files[name]) for name in sorted(files))
    values = ["the same to the bit" if value == 0 else f"{value:.1e}" for value in (loss, trained, averages, bits)]
    return (*values, verdict(max(loss, bits) <= allowed))


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weight_distance(file: Path, other: Path) -> float:
    """The norm of the difference of all weights, as a share of theirs."""
    found, others = load_file(file), load_file(other)
    apart = sum(float(((found[name].astype(float) - others[name]) ** 2).sum()) for name in found)
    return (apart / sum(float((value.astype(float) ** 2).sum()) for value in found.values())) ** 0.5


def use_model(check: Check, run: Path) -> None:
    """The same model, used here and on the CPU."""
    check.title("The model of that run, here and on the CPU", "command", "here", "on the CPU", "")

    def both(command: str, *flags: str) -> list:
        found = []
        for place in ("auto",) if check.dry else ("auto", "cpu"):
            file = check.folder / f"{command}_{place}.json"
            words = [command, "--checkpoint", str(run), "--device", place, "--json", str(file), *flags]
            check.run([sys.executable, "-m", "ds_tokimg", *words], on_cpu=place == "cpu")
            found.append(json.loads(file.read_text()))
        return found

    def evaluate() -> list[tuple]:
        found = [each["bits_per_token"] for each in both("evaluate", "--data_path", str(DATA))]
        here, there = found[0], found[-1]
        return [(f"{here:.4f}", f"{there:.4f}", verdict(largest_deviation([here], [there]) < 1e-3))]

    def generate() -> list[tuple]:
        texts = [[sample["text"] for sample in each] for each in both("generate", "--seed", "1")]
        here, there = texts[0][0], texts[-1][0]
        return [(repr(here[:40]), repr(there[:40]), "ok" if here == there else "ok, other draws")]

    check.rows(("evaluate, bits per token",), evaluate)
    check.rows(("generate, the first text",), generate)


def compare_ranks(check: Check) -> None:
    """One and all devices of this machine give the same losses."""
    count = 2 if check.dry else check.machine["count"]
    check.title("Ranks on this machine", "ranks", "largest deviation of 6 losses from those of one rank", "")
    flags = [*SMALL, *"--max_steps 6 --log_interval 1 --epochs 1 --eval_fraction 0".split()]
    flags += ["--deepspeed_config", str(fp32_json(check))]

    def losses(ranks: int) -> list[float]:
        return [row["loss"] for row in metrics(check.train(f"ranks_{ranks}", *flags, ranks=ranks))]

    def compare() -> list[tuple]:
        deviation = largest_deviation(losses(count), losses(1))
        return [(f"{deviation:.1e}", verdict(deviation < 1e-4))]

    if count > 1:
        check.rows((count,), compare)
    else:
        check.row(1, "this machine has one device", "")
