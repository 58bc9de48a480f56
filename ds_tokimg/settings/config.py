"""The settings of a training run: one dataclass, which also makes the command line, its help and config.json.

What the engine's JSON (`ds_config.json`) says is not repeated here. The flags that fill its `"auto"` values
are kept apart as optional fields: `None` means "not given", and ds_config.py decides what `"auto"` becomes.
This module imports neither torch nor deepspeed, so that `--help` and mistakes are answered at once.
"""

import argparse
import dataclasses
import json
import math
import re
import typing
from functools import partial
from pathlib import Path

from ds_tokimg.errors import UserError, alternatives, described, has_type, nearest, raise_problems, value_problems
from ds_tokimg.settings import formats

# What "auto" of the JSON becomes when no flag fills it.
DEFAULT_TRAIN_BATCH_SIZE = 32
DEFAULT_LR = 1e-3
DEFAULT_MAX_GRAD_NORM = 1.0

MODEL_NAME = re.compile(r"JiT-[A-Za-z0-9]+/([1-9]\d*)")  # "JiT-B/4": size B, patches of 4x4 pixels
SMALLEST_VOCABULARY = 257  # a byte-level BPE: 256 bytes and <|endoftext|>


def setting(group: str, default, help: str, choices: tuple[str, ...] = (), const=None):
    """A dataclass field that is also a command-line flag; `const` is its value when the flag stands alone."""
    metadata = {"group": group, "help": help, "choices": choices, "const": const}
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_data = partial(setting, "data")
_image = partial(setting, "token images")
_model = partial(setting, "model")
_objective = partial(setting, "objective")
_run = partial(setting, "run")
_engine = partial(setting, 'values that the engine\'s JSON leaves "auto"')


@dataclasses.dataclass
class TrainConfig:
    """Every setting of a run except what ds_config.json owns. Each default lives here and nowhere else."""

    data_path: str = _data("", "a .txt, .json, .jsonl or .parquet file, a folder of them, or a hub name")
    eval_data_path: str | None = _data(None, "validation texts (not given: some documents are held out)")
    eval_fraction: float = _data(0.05, "share of the documents held out, chosen by a hash of their text")
    tokenizer_path: str | None = _data(None, "tokenizer folder or hub name (not given: one is trained)")
    vocab_size: int = _data(1024, "vocabulary of the tokenizer that is trained, without --tokenizer_path")
    cache_dir: str | None = _data(None, "where tokenised data is cached")
    packing: bool = _data(True, "fill every image with documents joined by the end-of-text token")
    use_chat_template: bool = _data(False, "format prompt/answer pairs with the tokenizer's chat template")
    enable_condition: bool = _data(False, "give prompts to the model as a condition, an image of their own")
    condition_drop: float = _data(0.1, "probability of hiding a condition, for classifier-free guidance")
    max_tokens: int | None = _data(None, "tokens per image (not given: the image's capacity)")
    num_workers: int = _data(2, "background workers that tokenise and load data")

    img_size: int = _image(64, "height and width of an image in pixels")
    token_size: int = _image(1, "a token is a square of token_size x token_size pixels")
    radix: int | None = _image(None, "levels per channel (not given: the fewest that hold the vocabulary)")
    palette: str = _image("semantic", "which token gets which colour", ("id", "semantic"))
    layout: str = _image("patch", "order in which tokens fill the image", ("patch", "raster"))

    model: str = _model("JiT-XS/4", "size and patch of the transformer, such as JiT-B/4")
    positions: str = _model("reading", "a patch's position: reading order or grid", ("reading", "grid"))
    head: str = _model("posterior", "digit posteriors, or plain linear output", ("posterior", "linear"))
    posterior: str = _model("auto", "what the posterior head is over", ("auto", "digits", "tokens", "tree"))
    neighbours: int | None = _model(
        None, "tokens on either side that a token hears directly (not given: 2 where several share a patch, else 0)"
    )
    activation_checkpointing: bool = _model(False, "recompute activations: less memory, more time")
    compile: bool = _model(False, "compile the blocks: faster steps, a slow start (a CPU needs a C++ compiler)")

    objective: str = _objective("ce", "cross-entropy, squared error or weighted bound", ("ce", "mse", "elbo"))
    timesteps: str = _objective(
        "band", "where noise levels lie", ("band", "uniform", "logit_normal", "entropic", "noisy")
    )
    block_size: int = _objective(0, "patches that lose their noise together, from left to right; 0: the whole image")
    noisy_depth: int = _objective(0, "blocks, the last ones, that noisy patches go through from left to right; 0: all")
    patch_noise: float = _objective(0.5, "share of a batch whose patches have noise levels of their own")
    in_turn: float | None = _objective(
        None,
        "share of a batch whose tokens are predicted one after another (not given: 0.75, or 1 with noisy timesteps and "
        "blocks of one patch; 0 where a patch holds one token or digits are predicted)",
    )
    self_conditioning: float = _objective(0.0, "probability of showing the model its own prediction")
    ema_decay: list[float] = _objective((0.9999,), "decays of the weights' moving averages")  # noqa: RUF009

    epochs: int = _run(1, "passes over the data; they fix the length of the schedule")
    max_steps: int | None = _run(None, "end after this many optimiser steps, without changing the schedule")
    output_dir: str = _run("runs/default", "folder of the run")
    resume: str | None = _run(None, "'latest' (also when alone), 'best' or a checkpoint folder", const="latest")
    init_from: str | None = _run(None, "start a new run from the weights of this checkpoint or export")
    save_interval: int = _run(500, "optimiser steps between checkpoints")
    eval_interval: int = _run(500, "optimiser steps between validations")
    log_interval: int = _run(10, "optimiser steps between log lines")
    keep_checkpoints: int = _run(3, "newest checkpoints to keep (the best one stays too)")
    num_samples: int = _run(4, "texts to write at the end of the run")
    seed: int = _run(0, "seed of the weights, data order, noise and samples")
    warmup_ratio: float = _run(0.05, "share of all optimiser steps spent on warm-up")
    profile: int = _run(0, "optimiser steps to profile")
    deepspeed_config: str = _run("ds_config.json", "the engine's JSON, here or else as shipped")

    train_batch_size: int | None = _engine(
        None, f"texts per optimiser step over all ranks ({DEFAULT_TRAIN_BATCH_SIZE} if nothing fixes it)"
    )
    batch_size: int | None = _engine(None, "micro-batch: texts per rank and forward pass")
    gradient_accumulation_steps: int | None = _engine(None, "micro-batches per optimiser step")
    max_grad_norm: float | None = _engine(None, f"gradient clipping (default {DEFAULT_MAX_GRAD_NORM})")
    lr: float | None = _engine(None, f"peak learning rate (default {DEFAULT_LR})")
    use_amp: bool | None = _engine(None, "half precision, on a CPU too (not given: only on a GPU)")

    @classmethod
    def from_args(cls, argv: list[str]) -> "TrainConfig":
        """Settings from command-line flags. Raises one UserError that lists every mistake, unknown flags included.

        With --resume, what the flags leave out is as in the run's config.json, and what defines the run may not
        differ from it.
        """
        parser = build_parser("train", "Train a language model that writes in pixels.")
        flags, _ = parser.parse_known_args(argv)
        saved = saved_settings(flags.resume, flags.output_dir) if flags.resume else {}
        parser.set_defaults(**{name: value for name, value in saved.items() if name not in _OF_THE_LAUNCH})
        config = parse(parser, argv)[0]
        changed = [
            f"--{name} is {getattr(config, name)!r}, the run has {saved[name]!r}"
            for name in _FIXED
            if name in saved and getattr(config, name) != saved[name]
        ]
        raise_problems("a resumed run goes on as it began (start another with --init_from to change this):", changed)
        return config

    def validate(self) -> None:
        """Raise one UserError listing all settings of a wrong type, out of range or in contradiction."""
        raise_problems("these settings cannot be used:", self.problems())

    def problems(self) -> list[str]:
        """All mistakes in the settings, one sentence each, with the value seen and the fix."""
        wrong_types = [problem for field in dataclasses.fields(self) if (problem := self._type_problem(field))]
        if wrong_types:
            return wrong_types  # values of a wrong type cannot be compared
        return [
            *self._choice_problems(),
            *self._range_problems(),
            *self._image_problems(),
            *self._contradictions(),
        ]

    @property
    def patch_size(self) -> int:
        """Height and width of a patch in pixels, from the model's name."""
        match = MODEL_NAME.fullmatch(self.model)
        if match is None:
            raise UserError(f"--model {self.model!r}: expected a name such as JiT-B/4 (size B, patch 4)")
        return int(match[1])

    @property
    def capacity(self) -> int:
        """Tokens that fit in one image."""
        return (self.img_size // self.token_size) ** 2

    def save(self, path: str | Path) -> None:
        """Write all settings as JSON."""
        values = {"format": formats.FORMAT, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Settings written by `save`, of this format or an earlier one. UserError if the file is missing or broken, has
        unknown or missing settings, or bad values."""
        values = formats.read(path, formats.CONFIG)
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        problems = value_problems(values, fields)
        formats.refuse(path, problems or cls(**values).problems())
        return cls(**values)

    def _type_problem(self, field: dataclasses.Field) -> str | None:
        value = getattr(self, field.name)
        if has_type(value, field.type):
            return None
        return f"--{field.name} {value!r}: expected {described(field.type)}"

    def _choice_problems(self) -> list[str]:
        problems = []
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                known = ", ".join(choices)
                problems.append(f"--{field.name} {value!r}: choose one of {known}{nearest(value, choices)}")
        return problems

    def _range_problems(self) -> list[str]:
        problems = []
        for names, fits, expected in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    problems.append(f"--{name} {value}: expected {expected}")
        decays = self.ema_decay
        if len(set(decays)) < len(decays) or not all(0 < decay < 1 for decay in decays):
            problems.append(f"--ema_decay {decays}: expected different numbers between 0 and 1")
        return problems

    def _image_problems(self) -> list[str]:
        if MODEL_NAME.fullmatch(self.model) is None:
            return [f"--model {self.model!r}: expected a name such as JiT-B/4 (size B, patch 4)"]
        patch, problems = self.patch_size, []
        if self.img_size < 1 or self.token_size < 1:
            return []  # reported as out of range
        if self.img_size % patch:
            problems.append(f"--img_size {self.img_size} is not a multiple of the patch of --model {self.model}")
        if patch % self.token_size:
            problems.append(f"--token_size {self.token_size} does not divide the patch of --model {self.model}")
        elif self.max_tokens is not None and self.max_tokens > self.capacity:
            problems.append(
                f"--max_tokens {self.max_tokens}: an image of --img_size {self.img_size} with --token_size "
                f"{self.token_size} holds {self.capacity}"
            )
        return problems

    def _contradictions(self) -> list[str]:
        problems = []
        if not self.data_path:
            problems.append("--data_path is missing: name a file or folder of texts, or a data set")
        if self.head == "linear" and self.objective == "ce":
            problems.append("--head linear has no digit posteriors for --objective ce: use mse or elbo")
        if self.head == "linear" and self.timesteps == "entropic":
            problems.append("--head linear has no cross-entropy for --timesteps entropic to follow: use band")
        if self.head == "linear" and self.posterior != "auto":
            problems.append(f"--head linear has no posterior: drop --posterior {self.posterior}")
        if self.head == "linear" and self.neighbours:
            problems.append(f"--head linear has no posteriors to hear: drop --neighbours {self.neighbours}")
        if self.noisy_depth and not self.block_size:
            problems.append(f"--noisy_depth {self.noisy_depth} is for texts from left to right: give --block_size")
        if self.resume is not None and self.init_from is not None:
            problems.append("--resume continues a run and --init_from starts one: give only one of them")
        return problems


# What a resumed run does not take over from the earlier start: these belong to the start itself.
_OF_THE_LAUNCH = frozenset(
    (
        *("resume", "init_from", "output_dir", "max_steps", "profile"),
        *("train_batch_size", "batch_size", "gradient_accumulation_steps"),
    )
)
# What makes a run what it is: another value is another run.
_FIXED = (
    *("data_path", "eval_data_path", "eval_fraction", "vocab_size", "packing", "use_chat_template"),
    *("enable_condition", "condition_drop", "max_tokens", "img_size", "token_size", "radix", "palette", "layout"),
    *("model", "positions", "head", "posterior", "neighbours", "objective", "timesteps", "block_size", "noisy_depth"),
    *("patch_noise", "in_turn", "self_conditioning"),
    *("ema_decay", "seed"),
)

_COUNTS = (
    *("epochs", "max_steps", "save_interval", "eval_interval", "log_interval", "keep_checkpoints"),
    *("img_size", "token_size", "max_tokens"),
    *("train_batch_size", "batch_size", "gradient_accumulation_steps"),
)
_RANGES = (
    (_COUNTS, lambda value: value >= 1, "a whole number of at least 1"),
    (
        ("num_samples", "num_workers", "profile", "seed", "block_size", "noisy_depth", "neighbours"),
        lambda value: value >= 0,
        "0 or more",
    ),
    (
        ("condition_drop", "patch_noise", "in_turn", "self_conditioning"),
        lambda value: 0 <= value <= 1,
        "between 0 and 1",
    ),
    (("eval_fraction", "warmup_ratio"), lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    (("lr",), lambda value: 0 < value < math.inf, "a number above 0"),
    (("max_grad_norm",), lambda value: 0 <= value < math.inf, "0 (no clipping) or more"),
    (("radix",), lambda value: value >= 2, "at least 2 levels"),
    (("vocab_size",), lambda value: value >= SMALLEST_VOCABULARY, f"at least {SMALLEST_VOCABULARY}"),
)


def saved_settings(resume: str, output_dir: str) -> dict:
    """The settings of the run that --resume names; empty when there is none (finding the checkpoint says so)."""
    folder = Path(output_dir) if resume in ("latest", "best") else Path(resume)
    for path in (folder / "config.json", folder.parent.parent / "config.json"):
        if path.is_file():
            return dataclasses.asdict(TrainConfig.load(path))
    return {}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are UserErrors, so that one rank prints them, like all others."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser(command: str, description: str) -> Parser:
    """A parser of every flag of TrainConfig, to which a command may add its own."""
    prog = f"ds-tokimg {command}"
    parser = Parser(prog=prog, usage=f"{prog} --data_path PATH [flags]", description=description, allow_abbrev=False)
    groups = {}
    for field in dataclasses.fields(TrainConfig):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag = _add_switch if bool in alternatives(field.type) else _add_value
        add_flag(groups[title], field)
    # The deepspeed launcher passes it; the rank itself comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _add_switch(group, field: dataclasses.Field) -> None:
    """Add `--name` and `--no_name`; the help shows the one that changes the default."""
    on, off, text = f"--{field.name}", f"--no_{field.name}", field.metadata["help"]
    on_help, off_help = (argparse.SUPPRESS, f"do not {text}") if field.default else (text, argparse.SUPPRESS)
    group.add_argument(on, dest=field.name, action="store_true", default=field.default, help=on_help)
    group.add_argument(off, dest=field.name, action="store_false", default=field.default, help=off_help)


def _add_value(group, field: dataclasses.Field) -> None:
    """Add `--name VALUE`; a list takes any number of values."""
    value_type = kind = alternatives(field.type)[0]
    text, const, choices = (field.metadata[key] for key in ("help", "const", "choices"))
    default, options = field.default, {}
    if typing.get_origin(kind) is list:
        value_type, default, options = typing.get_args(kind)[0], field.default_factory(), {"nargs": "*"}
    if const is not None:
        options = {"nargs": "?", "const": const}
    if default not in (None, ""):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" (default: {shown})"
    metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[value_type]
    group.add_argument(f"--{field.name}", type=value_type, default=default, metavar=metavar, help=text, **options)


def parse(parser: Parser, argv: list[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """Settings and the values of the flags that a command added. One UserError lists every mistake."""
    arguments, unknown = parser.parse_known_args(argv)
    values = vars(arguments)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: values.pop(name) for name in names})
    known = [option for action in parser._actions for option in action.option_strings]
    flags = [word for word in unknown if word.startswith("-")] or unknown
    problems = [f"unknown argument {flag!r}{nearest(flag.split('=')[0], known)}" for flag in flags]
    raise_problems("the command line cannot be used:", problems + config.problems())
    return config, arguments
