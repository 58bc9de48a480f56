"""Bits per byte of held-out text for the compute spent: recipes, their ablations, and honest references.

    python -m benchmarks.learning --system at-once --corpus web_narrative --positions 1e6 [--set NAME=VALUE ...]

Systems: the recipes of ds_tokimg/recipes by their names, and references on the same texts. (Rows called `ours` and
`plain` are of the recipes `left-to-right` and, but for some settings, `at-once`, before they were files.) Corpora: the
bundled one, and `python`, the source of the interpreter's standard library (11 MB), a file a text. Another tokenizer
makes another corpus of it (bits per byte compare, bits per token do not).

Every run adds a line to benchmarks/learning.jsonl, from which `python -m benchmarks.tables` makes the pages. All
systems share layers, width, depth, optimiser, schedule, tokenizer and texts. Compute is transformer positions (forward
and backward) times parameters of the layers; the way between neighbouring tokens of patches that hold several counts as
the share of the layers that it costs.
"""

import argparse
import dataclasses
import functools
import json
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import ROOT
from benchmarks.references import Autoregressive, MaskedDiffusion, bits
from ds_tokimg import recipes
from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.engine.allocator import keep_freed_memory
from ds_tokimg.engine.optimizer import average_key, build_optimizer
from ds_tokimg.engine.ranks import OnlyRank
from ds_tokimg.inference.sampler import SamplingOptions, sample
from ds_tokimg.model.config import SIZES
from ds_tokimg.model.heads.tree import TreeHead
from ds_tokimg.settings.command_line import recipe_values
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training.assemble import assemble
from ds_tokimg.training.automatic import peak_learning_rate
from ds_tokimg.training.bound import BoundOptions, bound_of

# The reference system with its first three mistakes put right.
REPAIRED = {"radix": None, "timesteps": "band", "layout": "patch"}
REFERENCES = ("autoregressive", "autoregressive, shift", "masked", "masked, shift")
SYSTEMS = (*recipes.names(), "repaired", *REFERENCES)
EMA_DECAY = 0.9999
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


def settings_of(system: str) -> dict:
    """The settings of a recipe. References take texts and sizes from the recipe that is nearest to them."""
    if system in recipes.names():
        return recipe_values(system)
    return recipe_values("reference") | REPAIRED if system == "repaired" else recipe_values("left-to-right")


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
        block_size = self.block_sizes[step % len(self.block_sizes)]
        self.maker.packer = dataclasses.replace(self.maker.packer, block_size=block_size)
        batch = self.maker(self.parts.train_set, indices, positions, epoch)
        result = self.module(batch)
        if self.module.schedule is not None:
            self.module.schedule.update(result)
        computed = batch.ids.shape[0] * batch.ids.shape[1]
        layers = self.module.model.layers
        if batch.blocks is not None:
            # The clean ones go through all layers, but for all of the last one behind their keys and values; the noisy
            # ones through those from `entry` on.
            asked = _parameters(layers[-1].attention.qkv) / _parameters(layers[-1])
            computed *= (len(layers) - 1 + asked + len(layers[self.module.model.entry :])) / len(layers)
        if self.module.model.local_window is not None:
            per_token = _parameters(self.module.model.local_window) + _parameters(self.module.model.token_mlp)
            computed += batch.ids.numel() * per_token / _parameters(layers)
        return result["loss_sum"] / self.module.count(batch), computed

    def write(self, count: int, length: int, steps: int | None, eta: float) -> list[list[int]]:
        options = SamplingOptions(steps=steps, block_size=self.block_sizes[0], eta=eta)
        return sample(self.module.model, [length] * count, options)[0]

    def bits(self, block_size: int, levels: int, many_steps: bool = True) -> dict:
        writing = self.module.model.writing.asked(block_size, many_steps)
        options = BoundOptions(num_levels=levels)
        bound = bound_of(self.module, self.parts.text_format, self.parts.eval_set, writing, options=options)
        return {"bits_per_token": bound.bits_per_token, "bits_per_byte": bound.bits_per_byte}


class Reference:
    """An autoregressive or masked model on the same texts."""

    def __init__(self, parts, config: TrainConfig, kind: Callable):
        self.parts, self.config, self.maker = parts, config, parts.batch_maker
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


def prepare(arguments):
    """The system on its data."""
    extra = dict(item.split("=", 1) for item in arguments.set)
    extra = {name: _value(value) for name, value in extra.items()}
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = settings_of(arguments.system) | {k: v for k, v in extra.items() if k in fields}
    settings["tokenizer_path"] = arguments.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(seed=arguments.seed, **settings | corpus_settings(arguments.corpus, folder))
        config.validate()
        parts = assemble(config, OnlyRank(), None)
    torch.manual_seed(arguments.seed)
    kinds: dict[str, Callable] = {"autoregressive": Autoregressive, "masked": MaskedDiffusion}
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
    """Texts of the system, of the training set and real ones that were held out, as `benchmarks.text` reads them:
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
        save(name, system.write(arguments.texts, system.config.max_tokens, steps, arguments.eta))
        print(f"{name}: {arguments.texts} texts in {time.perf_counter() - begun:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--system", choices=SYSTEMS, default=recipes.DEFAULT)
    add("--corpus", choices=["web_narrative", "python"], default="web_narrative")
    add("--tokenizer", metavar="DIR", help="a tokenizer to load (default: one of 1,024 ids, trained on the corpus)")
    add("--positions", type=float, default=1e6)
    add("--batch", type=int, default=16)
    add("--lr", type=float, help="the peak (default: that of the recipe for the model's width)")
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
    arguments = parser.parse_args()
    keep_freed_memory()
    system = prepare(arguments)
    arguments.lr = arguments.lr or peak_learning_rate(system.config)
    corpus = arguments.corpus + (f", {Path(arguments.tokenizer).name}" if arguments.tokenizer else "")
    row = {"system": arguments.system, "corpus": corpus, "set": arguments.set}
    row |= {"seed": arguments.seed, "batch": arguments.batch, "lr": arguments.lr, "note": arguments.note}
    row |= {"optimizer": arguments.optimizer, "weights": arguments.weights}
    row |= train(system, arguments)
    system.module.eval()
    row |= {"parameters": _parameters(system.module.model.layers), "threads": torch.get_num_threads()}
    paths = arguments.paths or getattr(system, "block_sizes", [0])
    row["bits"] = {}
    for path in paths:
        writing = system.module.model.writing.asked(path) if isinstance(system, Ours) else Writing()
        if writing.one_step or writing.in_turn:
            name = "one step" if writing.one_step else "in turn"
            row["bits"][f"{path}, {name}"] = system.bits(path, arguments.levels, many_steps=False)
        # Of a tree many small steps would cost a softmax at each of them.
        if not (writing.one_step and isinstance(system.module.model.head, TreeHead)):
            row["bits"][path] = system.bits(path, arguments.levels)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    if arguments.write:
        write_texts(system, arguments)


if __name__ == "__main__":
    main()
