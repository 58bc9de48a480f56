"""Bits per byte of held-out text for the compute spent: the trainer's recipe, its ablations, and honest references.

    python benchmarks/learning.py --system ours --corpus web_narrative --positions 1e6 [--set NAME=VALUE ...]
    python benchmarks/learning.py --table

Corpora: the bundled one, and `python`, the source of the interpreter's standard library (11 MB), a file a text. Another
tokenizer makes another corpus of it (bits per byte compare, bits per token do not).

Every run adds a line to benchmarks/learning.jsonl; `--table` prints all lines as the table of learning.md. All systems
share blocks, width, depth, optimiser, schedule, tokenizer and texts. Compute is transformer positions (forward and
backward) times parameters of the blocks; the way between neighbouring tokens of patches that hold several counts as
the share of the blocks that it costs.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.references import Autoregressive, MaskedDiffusion, bits  # noqa: E402
from ds_tokimg.data.order import TrainBatchSampler  # noqa: E402
from ds_tokimg.engine.allocator import keep_freed_memory  # noqa: E402
from ds_tokimg.engine.optimizer import average_key, build_optimizer  # noqa: E402
from ds_tokimg.engine.ranks import OnlyRank  # noqa: E402
from ds_tokimg.inference.sampler import SamplingOptions, sample  # noqa: E402
from ds_tokimg.model.config import SIZES  # noqa: E402
from ds_tokimg.model.heads.base import draws_in_one_step  # noqa: E402
from ds_tokimg.model.heads.tree import TreeHead  # noqa: E402
from ds_tokimg.settings.config import TrainConfig  # noqa: E402
from ds_tokimg.training.assemble import assemble  # noqa: E402
from ds_tokimg.training.bound import bound_of  # noqa: E402

# The recipe of launch/train.sh; settings that are not named are the trainer's defaults.
RECIPE = {"model": "JiT-XS/2", "max_tokens": 256, "vocab_size": 1024}
RECIPE |= {"token_size": 2, "block_size": 1, "timesteps": "noisy", "noisy_depth": 1}
# All patches at once, four tokens each.
PLAIN = {"token_size": 1, "block_size": 0, "noisy_depth": 0, "timesteps": "band"}
REFERENCE = PLAIN | {
    "head": "linear",
    "objective": "mse",
    "timesteps": "uniform",
    "radix": 256,
    "layout": "raster",
    "patch_noise": 0.0,
    "palette": "id",
}
SYSTEMS = {
    "ours": {},
    "plain": PLAIN,
    "reference": REFERENCE,
    "repaired": REFERENCE | {"radix": None, "timesteps": "band", "layout": "patch"},
    "autoregressive": {},
    "autoregressive, shift": {},
    "masked": {},
    "masked, shift": {},
}
EMA_DECAY = 0.9999
LEARNING_RATE = 3e-3
RESULTS = ROOT / "benchmarks" / "learning.jsonl"


def corpus_settings(name: str, folder: str) -> dict:
    """The settings that name a corpus; what has to be written is written into the folder."""
    if name == "web_narrative":
        return {"data_path": str(ROOT / "data" / "web_narrative.txt")}
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(file for file in library.rglob("*.py") if not left_out & set(file.relative_to(library).parts))
    path = Path(folder) / "python.jsonl"
    with open(path, "w") as corpus:
        corpus.writelines(json.dumps({"text": file.read_text(errors="replace")}) + "\n" for file in files)
    # As many held-out tokens as in the other corpus, for the same time and error.
    return {"data_path": str(path), "eval_fraction": 0.02}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then half a cosine down to 5 % of the peak, as in ds_config.json."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


class Ours:
    """The trainer's model and loss, in a plain loop. `block_sizes` take turns, step by step."""

    def __init__(self, parts, config: TrainConfig, extra: dict):
        self.parts, self.config, self.module = parts, config, parts.module
        self.block_sizes = extra.get("blocks", [config.block_size])
        self.maker = parts.batch_maker

    def loss(self, indices, step: int, epoch: int, positions) -> tuple[torch.Tensor, float]:
        self.maker.block_size = self.block_sizes[step % len(self.block_sizes)]
        batch = self.maker(self.parts.train_set, indices, positions, epoch)
        result = self.module(batch)
        if self.module.schedule is not None:
            self.module.schedule.update(result)
        computed = batch["ids"].shape[0] * batch["ids"].shape[1]
        blocks = self.module.model.blocks
        if "blocks" in batch:
            # The clean ones go through all blocks, but for all of the last one behind their keys and values; the noisy
            # ones through those from `entry` on.
            asked = _parameters(blocks[-1].attention.qkv) / _parameters(blocks[-1])
            computed *= (len(blocks) - 1 + asked + len(blocks[self.module.model.entry :])) / len(blocks)
        if self.module.model.neighbours is not None:
            per_token = _parameters(self.module.model.neighbours) + _parameters(self.module.model.token_mlp)
            computed += batch["ids"].numel() * per_token / _parameters(blocks)
        return result["loss_sum"] / self.module.count(batch), computed

    def write(self, count: int, length: int, steps: int | None, eta: float) -> list[list[int]]:
        options = SamplingOptions(steps=steps, block_size=self.block_sizes[0], eta=eta)
        return sample(self.module.model, [length] * count, options)[0]

    def bits(self, block_size: int, levels: int, one_step: bool = False, in_turn: bool = False) -> dict:
        bound = bound_of(
            self.module,
            self.parts.text_format,
            self.parts.layout,
            self.parts.eval_set,
            num_levels=levels,
            block_size=block_size,
            one_step=one_step,
            in_turn=in_turn,
        )
        return {"bits_per_token": bound.bits_per_token, "bits_per_byte": bound.bits_per_byte}


class Reference:
    """An autoregressive or masked model on the same texts."""

    def __init__(self, parts, config: TrainConfig, kind: Callable):
        self.parts, self.maker = parts, parts.batch_maker
        depth, width, heads = SIZES[config.model.removeprefix("JiT-").split("/")[0]]
        vocab_size, eos = parts.layout.codec.vocab_size, parts.tokenizer.eos_token_id
        self.module = kind(vocab_size, eos, (depth, width, heads))

    def batch(self, dataset, indices):
        texts = [torch.from_numpy(dataset.ids(int(i)).astype(np.int64)) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0)
        lengths = torch.tensor([len(text) for text in texts])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    def loss(self, indices, step, epoch, positions):
        ids, mask = self.batch(self.parts.train_set, indices)
        return self.module.loss_of(ids, mask).sum() / mask.sum(), ids.numel()

    def write(self, count: int, length: int, steps: None, eta: float) -> list[list[int]]:
        return self.module.sample(count, length, seed=0).tolist()

    def bits(self, block_size: int, levels: int) -> dict:
        held_out, nats, tokens = self.parts.eval_set, 0.0, 0
        for start in range(0, len(held_out), 16):
            ids, mask = self.batch(held_out, range(start, min(start + 16, len(held_out))))
            nats += float(self.module.bound_nats(ids, mask, levels * 4).sum())
            tokens += int(mask.sum())
        return {"bits_per_token": bits(nats) / tokens, "bits_per_byte": bits(nats) / held_out.num_bytes}


def print_table() -> None:
    """The results so far: least compute first, then least bits."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    names = "corpus system settings seed batch positions tokens seconds path bits/token bits/byte".split()
    references = ("autoregressive", "autoregressive, shift")
    names += ["gap", "gap, shift"]
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    for row in sorted(rows, key=lambda row: (row["corpus"], row["positions"], min(_bits_per_byte(row)))):
        curves = [autoregressive_curve(rows, row["corpus"], system) for system in references]
        for path, figures in row["bits"].items():
            settings = _settings(row) + (f" ({row['note']})" if row.get("note") else "")
            cells = [row["corpus"], row["system"], settings.strip(), row["seed"], row["batch"]]
            cells += [f"{row['positions'] / 1e6:.2f} M", f"{row['tokens'] / 1e6:.2f} M", f"{row['seconds']:.0f}"]
            cells += ["plain" + path[1:] if path[0] == "0" else f"blocks of {path}"]
            cells += [f"{figures['bits_per_token']:.3f}", f"{figures['bits_per_byte']:.3f}"]
            cells += [compute_gap(row["positions"], figures["bits_per_byte"], curve) for curve in curves]
            print("| " + " | ".join(map(str, cells)) + " |")


def _settings(row: dict) -> str:
    """What differs from the recipe."""
    settings = list(row.get("set", []))
    for name, usual in (("lr", LEARNING_RATE), ("optimizer", "AdamW"), ("weights", "ema")):
        settings += [f"{name}={row[name]}"] if row.get(name, usual) != usual else []
    return " ".join(settings)


def autoregressive_curve(rows: list[dict], corpus: str, system: str = "autoregressive") -> list[tuple[float, float]]:
    """(positions, bits per byte) of an autoregressive reference: its best at each budget, while more compute helps."""
    curve: list[tuple[float, float]] = []
    same = [row for row in rows if row["system"] == system and row["corpus"] == corpus and not _settings(row)]
    for row in sorted(same, key=lambda row: (row["positions"], min(_bits_per_byte(row)))):
        if not curve or min(_bits_per_byte(row)) < curve[-1][1]:
            curve.append((row["positions"], min(_bits_per_byte(row))))
    return curve


def compute_gap(positions: float, bits_per_byte: float, curve: list[tuple[float, float]]) -> str:
    """How many times the compute of an autoregressive reference at the same bits per byte: linear between its
    measurements, in the logarithm of the compute; a bound where it was not measured that far."""
    if not curve:
        return ""
    if bits_per_byte > curve[0][1]:
        return f"> {positions / curve[0][0]:.1f}"
    if bits_per_byte < curve[-1][1]:
        return f"< {positions / curve[-1][0]:.1f}"
    spent, bits_then = zip(*reversed(curve), strict=True)
    return f"{positions / math.exp(np.interp(bits_per_byte, bits_then, np.log(spent))):.1f}"


def _bits_per_byte(row: dict) -> list[float]:
    return [figures["bits_per_byte"] for figures in row["bits"].values()]


def prepare(arguments):
    """The system on its data."""
    extra = dict(item.split("=", 1) for item in arguments.set)
    extra = {name: _value(value) for name, value in extra.items()}
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = RECIPE | SYSTEMS[arguments.system] | {k: v for k, v in extra.items() if k in fields}
    settings["tokenizer_path"] = arguments.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(seed=arguments.seed, **settings | corpus_settings(arguments.corpus, folder))
        config.validate()
        parts = assemble(config, OnlyRank(), None)
    torch.manual_seed(arguments.seed)
    kinds = {"autoregressive": Autoregressive, "masked": MaskedDiffusion}
    kinds |= {f"{name}, shift": functools.partial(kind, shift=True) for name, kind in kinds.items()}
    if arguments.system in kinds:
        return Reference(parts, config, kinds[arguments.system])
    return Ours(parts, config, extra)


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def train(system, arguments) -> dict:
    """Spends the budget and measures: bits of the averaged weights, tokens, seconds, positions."""
    settings = {"lr": arguments.lr, "betas": [0.9, 0.95], "weight_decay": 0.01}
    block = {"type": arguments.optimizer, "params": settings}
    optimizer = build_optimizer(list(system.module.parameters()), block, EMA_DECAY)
    sampler = TrainBatchSampler(system.parts.train_set.lengths, arguments.batch, arguments.seed)
    module, step, positions, tokens, begun, losses = system.module, 0, 0.0, 0, time.perf_counter(), []
    steps = None
    for epoch in range(10_000):
        for number, indices in enumerate(sampler.batches(epoch)):
            loss, computed = system.loss(indices, step, epoch, number * arguments.batch + np.arange(len(indices)))
            if steps is None:
                # All batches of packed texts are equal; alternating modes are paid for in turn.
                per_step = [2 if size else 1 for size in getattr(system, "block_sizes", [0])]
                mean = computed / per_step[0] * sum(per_step) / len(per_step)
                steps = max(1, round(arguments.positions / mean))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, arguments.lr)
            optimizer.step()
            optimizer.zero_grad()
            step, positions = step + 1, positions + computed
            tokens += int(system.parts.train_set.lengths[indices].sum())
            losses.append(loss.item())
            if step % 100 == 0:
                print(step, steps, f"{np.mean(losses[-100:]):.4f} {time.perf_counter() - begun:.0f} s", flush=True)
            if step >= steps:
                seconds = time.perf_counter() - begun
                if arguments.weights == "ema":
                    use_averages(optimizer)
                return {"steps": step, "positions": positions, "tokens": tokens, "seconds": seconds}
    raise AssertionError


@torch.no_grad()
def use_averages(optimizer) -> None:
    for parameter, state in optimizer.state.items():
        parameter.copy_(state[average_key(EMA_DECAY)])


def write_texts(system, arguments) -> None:
    """Texts of the system, of the training set and real ones that were held out, as `benchmarks/text.py` reads them:
    a JSON list of strings each, all of as many tokens."""
    folder, parts = Path(arguments.write), system.parts
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, rows) -> None:
        strings = [parts.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
        (folder / f"{name}.json").write_text(json.dumps(strings, ensure_ascii=False))

    save("train", (parts.train_set.ids(i) for i in range(len(parts.train_set))))
    save("real", (parts.eval_set.ids(i) for i in range(len(parts.eval_set))))
    for steps in arguments.steps or [None]:
        begun = time.perf_counter()
        name = arguments.system if steps is None else f"{arguments.system}, {steps} steps"
        save(name, system.write(arguments.texts, RECIPE["max_tokens"], steps, arguments.eta))
        print(f"{name}: {arguments.texts} texts in {time.perf_counter() - begun:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--system", choices=SYSTEMS, default="ours")
    add("--corpus", choices=["web_narrative", "python"], default="web_narrative")
    add("--tokenizer", metavar="DIR", help="a tokenizer to load (default: one of 1,024 ids, trained on the corpus)")
    add("--positions", type=float, default=1e6)
    add("--batch", type=int, default=16)
    add("--lr", type=float, default=LEARNING_RATE)
    add("--optimizer", choices=["AdamW", "Muon"], default="AdamW", help="of the trainer")
    add("--weights", choices=["ema", "trained"], default="ema", help="which ones are measured")
    add("--seed", type=int, default=0)
    add("--levels", type=int, default=8, help="noise levels a text is evaluated at")
    add("--paths", type=int, nargs="*", help="block sizes of the bounds to measure (default: those trained)")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the trainer; blocks=[1,4]: in turn")
    add("--note", default="", help="kept with the result")
    add("--write", metavar="DIR", help="write texts of the trained system there, for text.py")
    add("--texts", type=int, default=200, help="how many")
    add("--steps", type=int, nargs="*", help="sampling steps, one file each (default: as many as `generate` takes)")
    add("--eta", type=float, default=SamplingOptions.eta, help="noise that the sampler replaces (default: %(default)s)")
    add("--table", action="store_true", help="print the results so far")
    arguments = parser.parse_args()
    if arguments.table:
        return print_table()
    keep_freed_memory()
    system = prepare(arguments)
    corpus = arguments.corpus + (f", {Path(arguments.tokenizer).name}" if arguments.tokenizer else "")
    row = {"system": arguments.system, "corpus": corpus, "set": arguments.set}
    row |= {"seed": arguments.seed, "batch": arguments.batch, "lr": arguments.lr, "note": arguments.note}
    row |= {"optimizer": arguments.optimizer, "weights": arguments.weights}
    row |= train(system, arguments)
    system.module.eval()
    row |= {"parameters": _parameters(system.module.model.blocks), "threads": torch.get_num_threads()}
    paths = arguments.paths or getattr(system, "block_sizes", [0])
    row["bits"] = {}
    for path in paths:
        model = system.module.model if isinstance(system, Ours) else None
        in_turn = model is not None and model.config.in_turn
        one_step = model is not None and draws_in_one_step(model.head, path, in_turn)
        if one_step:
            row["bits"][f"{path}, one step"] = system.bits(path, arguments.levels, True, in_turn)
        elif in_turn:
            row["bits"][f"{path}, in turn"] = system.bits(path, arguments.levels, in_turn=True)
        # Of a tree many small steps would cost a softmax at each of them.
        if not (one_step and isinstance(model.head, TreeHead)):
            row["bits"][path] = system.bits(path, arguments.levels)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    if arguments.write:
        write_texts(system, arguments)
    return None


if __name__ == "__main__":
    main()
