"""Step time, bytes and collectives of 1, 2 and 4 real ranks at every ZeRO stage, and a model of them up to 1,024 ranks.

    python -m benchmarks.scaling     writes scaling.md and scaling.png into benchmarks/results (about four minutes)

Weak scaling: a rank's micro-batch stays the same. The model adds up what is measured on its own:

    step = compute x max(1, ranks / cores) + calls x latency + sent bytes / bandwidth

compute is the step of one rank at the same stage; calls and sent bytes follow from the stage (`traffic`); latency and
bandwidth are those of all-reduces of 4 KB and of 32 MB among as many ranks. It is compared with the measured steps, and
then given one core a rank and a cluster's figures (flags) to see where scaling ends.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

from benchmarks import ROOT
from ds_tokimg.settings.engine_json import CPU_BUCKET_SIZE
from ds_tokimg.training.memory import REDUCE_BUCKET_SIZE
from tests.support.distributed import run_ranks

RANKS, STAGES = (1, 2, 4), (0, 1, 2, 3)
MANY = tuple(2**power for power in range(11))  # 1 ... 1024
WARM_UP, STEPS = 2, 7
FLAGS = "--model JiT-S/4 --max_tokens 512 --vocab_size 4096 --palette id --patch_noise 0".split()
MICRO_BATCH, LARGE_MICRO_BATCH = 4, 64
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor"),
    *("reduce_scatter_tensor", "reduce_scatter"),
)
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8a5fbf")  # of the stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teraflops", type=float, default=100, help="a cluster's rate a rank, on matrix products")
    parser.add_argument("--gigabytes", type=float, default=25, help="a cluster's bandwidth a rank, GB/s")
    parser.add_argument("--microseconds", type=float, default=10, help="a cluster's latency of one message")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of the ranks
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        links = {ranks: run_ranks(ranks, measure_links)[0] for ranks in RANKS[1:]}
        cases = {(ranks, stage): measure_case(ranks, stage) for stage in STAGES for ranks in RANKS}
        large = run_ranks(1, describe_large)[0]
    cluster = {"rate": args.teraflops * 1e12, "bandwidth": args.gigabytes * 1e9, "latency": args.microseconds * 1e-6}
    curves = {
        "one core a rank, gloo": {stage: here(stage, cases, links) for stage in STAGES},
        "a cluster": {stage: elsewhere(stage, large, cluster) for stage in STAGES},
    }
    results = ROOT / "benchmarks" / "results"
    (results / "scaling.md").write_text(report(cases, links, curves, large, args))
    draw(cases, links, curves, results / "scaling.png")


# ---- what is measured ----


class Traffic:
    """Counts the collectives of torch and of DeepSpeed, which calls torch's, while it is active: calls, bytes of the
    whole tensor, seconds until they are done."""

    def __enter__(self):
        import deepspeed
        import torch

        self.calls, self.bytes, self.seconds, self._depth = {}, {}, 0.0, 0
        places = (torch.distributed, deepspeed.comm.comm.cdb)
        self.originals = [(place, name, getattr(place, name)) for place in places for name in COLLECTIVES]
        for place, name, function in self.originals:
            setattr(place, name, self._counting(name, function))
        return self

    def __exit__(self, *error) -> None:
        for place, name, function in self.originals:
            setattr(place, name, function)

    def _counting(self, name: str, function):
        def call(*args, **kwargs):
            begun = time.perf_counter()
            self._depth += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth > 0:
                return result
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + max(map(_size, [*args, *kwargs.values()]))
            self.seconds += time.perf_counter() - begun
            return _Timed(result, self) if result is not None else None

        return call


class _Timed:
    """The handle of a collective that runs on: waiting for it counts."""

    def __init__(self, work, traffic: Traffic):
        self.work, self.traffic = work, traffic

    def wait(self, *args):
        begun = time.perf_counter()
        self.work.wait(*args)
        self.traffic.seconds += time.perf_counter() - begun

    def __getattr__(self, name):
        return getattr(self.work, name)


def _size(value) -> int:
    """Bytes of a tensor or of a list of tensors, 0 of anything else."""
    import torch

    if isinstance(value, list):
        return sum(map(_size, value))
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def loopback_bytes() -> int:
    """Sent over the loopback interface so far, by all processes: ranks on one machine talk over nothing else."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def measure_links(dist) -> tuple[float, float]:
    """(seconds a call, bytes a second sent by a rank) of all-reduces among these ranks."""
    import torch

    def seconds(size: int, times: int) -> float:
        tensor, found = torch.ones(size // 4), []
        for _ in range(times):
            dist.barrier()
            begun = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            found.append(time.perf_counter() - begun)
        return median(found)

    latency, large = seconds(4096, 50), 32 * 2**20
    return latency, sent("all_reduce", large, dist.world_size) / (seconds(large, 9) - latency)


def measure_case(ranks: int, stage: int) -> dict:
    """Medians over steps of a step's seconds and its collectives; bytes per rank and step."""
    results = run_ranks(ranks, measure, stage, timeout=300)
    case = dict(results[0])
    for key in ("seconds", "in_collectives"):
        case[key] = median(median(result[key]) for result in results)
    case["on_the_wire"] = results[0]["on_the_wire"] / ranks
    print(ranks, stage, json.dumps(case), file=sys.stderr)
    return case


def measure(dist, stage: int) -> dict:
    """Steps of a real engine on this rank's full images."""
    from ds_tokimg.engine.allocator import keep_freed_memory

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.rank % len(cores)]})  # or two ranks may meet on one core, and another is idle
    keep_freed_memory()
    engine, batch = make_engine(dist, stage)
    for _ in range(WARM_UP):
        engine.train_batch([batch])
    seconds, in_collectives = [], []
    dist.barrier()
    wire = loopback_bytes()
    for _ in range(STEPS):
        with Traffic() as traffic:
            begun = time.perf_counter()
            engine.train_batch([batch])
            seconds.append(time.perf_counter() - begun)
            in_collectives.append(traffic.seconds)
    dist.barrier()
    return {
        "seconds": seconds,
        "in_collectives": in_collectives,
        "calls": traffic.calls,
        "bytes": traffic.bytes,
        "on_the_wire": (loopback_bytes() - wire) / STEPS,
        "parameters": sum(math.prod(shape) for shape in engine.layout["params"].values()),
        "tensors": len(engine.layout["params"]),
    }


def make_engine(dist, stage: int):
    from ds_tokimg.engine.engine import TrainEngine, machine_capabilities
    from ds_tokimg.settings import engine_json
    from ds_tokimg.settings.command_line import train_config
    from ds_tokimg.training.assemble import assemble
    from ds_tokimg.training.forecast import longest_batch

    data = ["--data_path", str(ROOT / "data" / "web_narrative.txt")]
    config = train_config([*data, *FLAGS, "--train_batch_size", str(MICRO_BATCH * dist.world_size)])
    parts = assemble(config, dist, None)
    raw = json.loads((ROOT / "ds_config.json").read_text()) | {"zero_optimization": {"stage": stage}}
    settings, _ = engine_json.resolve(raw, config, machine_capabilities(), parts.steps_per_epoch)
    batch = longest_batch(parts, MICRO_BATCH)
    return TrainEngine(parts.module, settings, config.ema_decay, dist), batch


def describe_large(dist) -> dict:
    """JiT-B/4 on a large micro-batch of full images: parameters and operations a step."""
    from ds_tokimg.model.flops import BatchShape, train_flops
    from ds_tokimg.model.jit import JiT
    from ds_tokimg.tokens.codec import TokenCodec
    from ds_tokimg.training.memory import empty_weights

    with empty_weights():
        model = JiT.from_name("JiT-B/4", TokenCodec(151_643))
    shape = BatchShape(LARGE_MICRO_BATCH, model.num_patches, prompt=None, levels=1, from_left=False)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "tensors": len(list(model.parameters())), "flops": train_flops(model, shape)}


# ---- the model ----


def traffic(stage: int, parameters: int, tensors: int, width: int = 4, bucket: int = CPU_BUCKET_SIZE) -> list[tuple]:
    """(collective, calls, bytes of the whole tensor in all) of one step, accumulation 1.

    Stage 0 averages all gradients. Stages 1 and 2 do so too, bucket by bucket (DeepSpeed 0.19.8 keeps a rank's part of
    the sum and drops the rest), and gather the new weights. Stage 3 gathers each weight where it is used first (models
    above `stage3_max_live_parameters`, 1e9, do so again in the backward) and scatters the sums of the gradients.
    """
    size, buckets = parameters * width, math.ceil(parameters / bucket)
    if stage == 0:
        return [("all_reduce", 1, size)]
    if stage < 3:
        return [("all_reduce", buckets, size), ("all_gather", 2, size)]
    return [("all_gather", tensors, size), ("reduce_scatter", buckets, size)]


def sent(collective: str, size: float, ranks: int, backend: str = "gloo") -> float:
    """Bytes that a rank sends on average: rings. gloo scatters a sum by making all of it everywhere."""
    twice = ("all_reduce", "reduce_scatter") if backend == "gloo" else ("all_reduce",)
    return (2.0 if collective in twice else 1.0) * size * (ranks - 1) / ranks


def communication(found: list, ranks: int, latency: float, bandwidth: float, backend: str = "gloo") -> float:
    """Seconds of a step's collectives, one after the other."""
    return sum(calls * latency + sent(name, size, ranks, backend) / bandwidth for name, calls, size in found)


def predicted(ranks: int, stage: int, cases: dict, links: dict) -> tuple[float, float]:
    """(seconds of a step, of them in collectives) on this machine."""
    alone = cases[1, stage]
    crowded = max(1.0, ranks / len(os.sched_getaffinity(0)))
    if ranks == 1:
        return alone["seconds"], 0.0
    found = traffic(stage, alone["parameters"], alone["tensors"])
    spent = communication(found, ranks, *links[ranks])
    return alone["seconds"] * crowded + spent, spent


def here(stage: int, cases: dict, links: dict) -> list[float]:
    """Efficiency at `MANY` ranks, each with a core like ours and links like those of our two ranks."""
    latency, bandwidth = links[2]
    alone = cases[1, stage]
    compute, parameters, tensors = alone["seconds"], alone["parameters"], alone["tensors"]
    times = [
        compute + communication(traffic(stage, parameters, tensors), n, latency * math.log2(n), bandwidth) for n in MANY
    ]
    return [cases[1, 0]["seconds"] / seconds for seconds in times]


def elsewhere(stage: int, large: dict, cluster: dict) -> list[float]:
    """The same for a JiT-B/4 in bf16 on a cluster, nothing overlapped."""
    compute = large["flops"] / cluster["rate"]
    times = []
    for n in MANY:
        found = traffic(stage, large["parameters"], large["tensors"], width=2, bucket=REDUCE_BUCKET_SIZE)
        latency = cluster["latency"] * math.log2(n)
        times.append(compute + communication(found, n, latency, cluster["bandwidth"], "nccl"))
    return [compute / seconds for seconds in times]


# ---- the report ----


def report(cases: dict, links: dict, curves: dict, large: dict, args) -> str:
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line).split(": ")[1]
    cores, one = len(os.sched_getaffinity(0)), cases[1, 0]
    lines = [
        "# Scaling",
        "",
        f"`{' '.join(['python -m benchmarks.scaling', *sys.argv[1:]])}`, {date.today()}, {model}, {cores} cores, "
        f"Python {platform.python_version()}, gloo over the loopback interface, fp32.",
        "",
        f"JiT-S/4, {one['parameters'] / 1e6:.1f} M parameters in {one['tensors']} tensors, micro-batch "
        f"{MICRO_BATCH} of 512 tokens on every rank (weak scaling), one thread a rank, pinned to a core. "
        f"Medians of {STEPS} steps.",
        "",
        "## Measured, and the model beside it",
        "",
        "| ranks | ZeRO stage | step, s | in collectives | MB sent a rank and step | the model: step, s | MB | "
        "step measured / model | MB measured / model |",
        "|---" * 9 + "|",
    ]
    for ranks in RANKS:
        lines += [measured_row(ranks, stage, cases, links) for stage in STAGES]
    lines += [
        "",
        "Bytes sent are what the loopback interface carried. Where ranks share cores, waiting for a rank that has none "
        "counts as time in collectives. The model's compute is that of one rank alone, which has the memory's "
        "bandwidth and the last level of cache to itself.",
        "",
        "| links of | latency of an all-reduce, ms | bandwidth, GB/s sent a rank |",
        "|---|---|---|",
        *(f"| {n} ranks | {1e3 * latency:.2f} | {band / 1e9:.2f} |" for n, (latency, band) in links.items()),
        "",
        "Calls and bytes of whole tensors in a step, as DeepSpeed asks torch for them:",
        "",
        *(f"- {n} ranks, stage {stage}: {words_of(cases[n, stage])}" for n in RANKS[1:] for stage in STAGES),
        "",
        "## Up to 1,024 ranks: share of perfect scaling, by the model",
        "",
        *efficiency_table(
            "one core a rank, gloo", curves, "the run above, a core for each rank, links as between two ranks"
        ),
        "",
        *efficiency_table(
            "a cluster",
            curves,
            f"JiT-B/4 ({large['parameters'] / 1e6:.0f} M parameters), bf16, {LARGE_MICRO_BATCH} full images a rank, "
            f"{args.teraflops:g} TFLOP/s, {args.gigabytes:g} GB/s and {args.microseconds:g} µs a rank: assumed, not "
            "measured",
        ),
        "",
        "Latency grows with the logarithm of the ranks (trees) and no rank waits for a slower one, which flatters; "
        "nothing overlaps with the backward, which does not.",
        "",
        "![Measured steps beside the model, and efficiency up to 1,024 ranks](scaling.png)",
    ]
    return "\n".join(lines) + "\n"


def measured_row(ranks: int, stage: int, cases: dict, links: dict) -> str:
    case = cases[ranks, stage]
    seconds, _ = predicted(ranks, stage, cases, links)
    found = traffic(stage, case["parameters"], case["tensors"]) if ranks > 1 else []
    volume = sum(sent(name, size, ranks) for name, _, size in found)
    share = case["in_collectives"] / case["seconds"]
    ratio = f"{case['on_the_wire'] / volume:.2f}" if volume else "-"
    return (
        f"| {ranks} | {stage} | {case['seconds']:.2f} | {share:.0%} | {case['on_the_wire'] / 1e6:.0f} | "
        f"{seconds:.2f} | {volume / 1e6:.0f} | {case['seconds'] / seconds:.2f} | {ratio} |"
    )


def words_of(case: dict) -> str:
    return ", ".join(f"{calls} {name} of {case['bytes'][name] / 1e6:,.1f} MB" for name, calls in case["calls"].items())


def efficiency_table(name: str, curves: dict, words: str) -> list[str]:
    rows = [f"| {stage} | {' | '.join(f'{value:.0%}' for value in curves[name][stage])} |" for stage in STAGES]
    return [f"{words}:", "", f"| stage | {' | '.join(f'{n:,}' for n in MANY)} |", "|---" * (len(MANY) + 1) + "|", *rows]


def draw(cases: dict, links: dict, curves: dict, path: Path) -> None:
    """Left: measured step times and the model's. Right: efficiency by number of ranks."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (1500, 520), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    most = 1.05 * max(max(case["seconds"], predicted(n, stage, cases, links)[0]) for (n, stage), case in cases.items())
    panels = [(80, "step, s (dots: measured, lines: model), by ranks", RANKS, most)]
    panels += [(80 + 500 * i, f"efficiency, {name}, by ranks", MANY, 1.0) for i, name in enumerate(curves, 1)]
    for left, title, ranks, top in panels:
        frame(pen, font, left, title, ranks, top)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        model = [predicted(n, stage, cases, links)[0] / most for n in RANKS]
        pen.line([place(80, x, y, len(RANKS)) for x, y in enumerate(model)], fill=colour, width=3)
        for x, n in enumerate(RANKS):
            px, py = place(80, x, cases[n, stage]["seconds"] / most, len(RANKS))
            pen.ellipse([px - 6, py - 6, px + 6, py + 6], outline=colour, width=3)
        for number, name in enumerate(curves, 1):
            points = [place(80 + 500 * number, x, y, len(MANY)) for x, y in enumerate(curves[name][stage])]
            pen.line(points, fill=colour, width=3)
        pen.text((100 + 110 * stage, 490), f"stage {stage}", fill=colour, font=font)
    image.save(path, optimize=True)


def place(left: int, x: int, y: float, count: int) -> tuple[float, float]:
    """Pixels of a value at step `x` of `count` and height `y` in [0, 1] of the panel that begins at `left`."""
    return left + 380 * x / (count - 1), 440 - 380 * y


def frame(pen, font, left: int, title: str, ranks: tuple, top: float) -> None:
    pen.rectangle([left, 60, left + 380, 440], outline="#888888")
    pen.text((left, 25), title, fill="black", font=font)
    for part in range(6):
        y = place(left, 0, part / 5, 2)[1]
        pen.line([left, y, left + 380, y], fill="#dddddd")
        pen.text((left - 8, y), f"{top * part / 5:.2f}", fill="black", font=font, anchor="rm")
    for x, n in enumerate(ranks):
        pen.text((place(left, x, 0, len(ranks))[0], 448), str(n), fill="black", font=font, anchor="ma")


if __name__ == "__main__":
    main()
