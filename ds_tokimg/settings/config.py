"""The settings of a training run: dataclasses, one a group, which also make the command line, recipes and config.json.

What the engine's JSON (`ds_config.json`) says is not repeated here. The flags that fill its `"auto"` values
are kept apart as optional fields: `None` means "not given", and engine_json.py decides what `"auto"` becomes.
This module imports neither torch nor deepspeed, so that `--help` and mistakes are answered at once.
"""

import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path

from ds_tokimg import choices
from ds_tokimg.errors import UserError, raise_problems, value_problems
from ds_tokimg.settings import formats
from ds_tokimg.settings.files import absolute, write_text
from ds_tokimg.settings.setting import (
    CLIPPING,
    COUNT,
    FIXED,
    LAUNCH,
    POSITIVE,
    PROPER_SHARE,
    SAME_TEXTS,
    SHARE,
    WHOLE,
    Range,
    setting,
    type_problem,
    value_problem,
)

DEFAULT_MAX_GRAD_NORM = 1.0  # what "auto" of the JSON becomes when no flag fills it

MODEL_NAME = re.compile(r"JiT-[A-Za-z0-9]+/([1-9]\d*)")  # "JiT-B/4": size B, patches of 4x4 pixels
SMALLEST_VOCABULARY = 257  # a byte-level BPE: 256 bytes and <|endoftext|>

_fixed = partial(setting, resume=FIXED)
_method = partial(setting, resume=FIXED, of_recipe=True)
_launch = partial(setting, resume=LAUNCH, in_recipe=False)
_path = partial(setting, is_path=True)


@dataclasses.dataclass
class DataSettings:
    """Which texts are trained on, and how they are cut into samples."""

    data_path: list[str] = _path(  # noqa: RUF009
        (),
        "files, folders or hub names of texts; PATH:WEIGHT, all of them, for their shares of an epoch",
        resume=SAME_TEXTS,
    )
    eval_data_path: str | None = _path(
        None, "validation texts (not given: some documents are held out)", resume=SAME_TEXTS
    )
    eval_fraction: float = _fixed(
        0.05, "share of the documents held out, chosen by a hash of their text; 0: no validation", PROPER_SHARE
    )
    text_key: str | None = _fixed(None, "key or column that holds the text of a record (not given: text)")
    document: str | None = _fixed(
        None,
        "what one text of a .txt or .md file is (not given: a line of a .txt, all of a .md)",
        choices=choices.DOCUMENTS,
    )
    skip_bad_records: bool = _fixed(False, "leave out bad records, and say how many")
    tokenizer_path: str | None = _path(None, "tokenizer folder or hub name (not given: one is trained)")
    vocab_size: int = _fixed(
        1024,
        "vocabulary of the tokenizer that is trained, without --tokenizer_path",
        Range(f"at least {SMALLEST_VOCABULARY}", lambda value: value >= SMALLEST_VOCABULARY),
    )
    cache_dir: str | None = _path(None, "where tokenised data is cached", rare=True)
    streaming: bool = _fixed(
        False, "tokenise texts while they are trained on and cache nothing: for texts beyond the disk's room", rare=True
    )
    packing: bool = _fixed(True, "fill every image with documents joined by the end-of-text token")
    use_chat_template: bool = _fixed(False, "format prompt/answer pairs with the tokenizer's chat template")
    enable_condition: bool = _fixed(False, "give prompts to the model as a condition, an image of their own")
    condition_drop: float = _method(0.1, "probability of hiding a condition, for classifier-free guidance", SHARE)
    max_tokens: int | None = _fixed(None, "tokens per image, at most (not given: the image's capacity)", COUNT)
    num_workers: int = setting(2, "background workers that tokenise and load data", WHOLE, rare=True)


@dataclasses.dataclass
class ImageSettings:
    """How tokens become pixels."""

    img_size: int = _fixed(64, "height and width of an image in pixels", COUNT)
    token_size: int = _fixed(1, "a token is a square of token_size x token_size pixels", COUNT, rare=True)
    radix: int | None = _method(
        None,
        "levels per channel (not given: the fewest that hold the vocabulary)",
        Range("at least 2 levels", lambda value: value >= 2),
    )
    palette: str = _method("semantic", "which token gets which colour", choices=choices.PALETTES)
    layout: str = _method("patch", "order in which tokens fill the image", choices=choices.LAYOUTS)


@dataclasses.dataclass
class ModelSettings:
    """The transformer and its output."""

    model: str = _fixed("JiT-XS/4", "size and patch of the transformer, such as JiT-B/4")
    head: str = _method("posterior", "digit posteriors, or plain linear output", choices=choices.HEADS)
    posterior: str = _method("auto", "what the posterior head is over", choices=choices.POSTERIORS)
    local_window: int | None = _method(
        None,
        "tokens on either side in a token's local window (not given: 2 where several share a patch, else 0)",
        WHOLE,
    )
    noisy_depth: int = _method(
        0, "layers, the last ones, that noisy patches go through from left to right; 0: all", WHOLE
    )
    activation_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    compile: bool = setting(False, "compile the layers: faster steps, a slow start (a CPU needs a C++ compiler)")


@dataclasses.dataclass
class ObjectiveSettings:
    """What is learnt: noise levels, loss, and how texts will be written."""

    objective: str = _method("ce", "cross-entropy, squared error or weighted bound", choices=choices.OBJECTIVES)
    timesteps: str = _method("band", "where noise levels lie", choices=choices.TIMESTEPS)
    block_size: int = _method(
        0, "patches that lose their noise together, from left to right; 0: the whole image", WHOLE
    )
    patch_noise: float = _method(0.5, "share of a batch whose patches have noise levels of their own", SHARE)
    in_turn: float | None = _method(
        None,
        "share of a batch whose tokens are predicted one after another (not given: 0.75, or 1 with noisy timesteps and "
        "blocks of one patch; 0 where a patch holds one token or digits are predicted)",
        SHARE,
    )
    ema_decay: float = _method(0.9999, "decay of the weights' moving average; 0: none", PROPER_SHARE)


@dataclasses.dataclass
class RunSettings:
    """How long a run is, where it writes, and how often."""

    recipe: str | None = _path(
        None,
        "at-once, left-to-right, reference, or a TOML file: the settings of a method",
        resume=FIXED,
        in_recipe=False,
        metavar="NAME",
    )
    epochs: int | None = setting(
        None,
        "passes over the data, which fix the length of the schedule (not given: it follows from the corpus)",
        COUNT,
    )
    max_steps: int | None = _launch(None, "end after this many optimiser steps, without changing the schedule", COUNT)
    output_dir: str = _launch("runs/default", "folder of the run", is_path=True)
    resume: str | None = _launch(
        None,
        "'latest' (also when alone), 'best', a checkpoint's folder, or 'auto': where there is a checkpoint",
        const="latest",
        is_path=True,
        metavar="WHICH",
    )
    accept_other_texts: bool = _launch(
        False,
        "with --resume: go on although the texts are not those of the run; then their order, the held-out ones and the "
        "best validation begin anew",
        rare=True,
    )
    init_from: str | None = _launch(None, "start a new run from the weights of this checkpoint or export", is_path=True)
    save_interval: int = setting(500, "optimiser steps between checkpoints", COUNT)
    eval_interval: int = setting(500, "optimiser steps between validations", COUNT)
    eval_tokens: int | None = setting(
        None,
        "held-out tokens that a validation reads, the same texts each time; 0: all (not given: as many as cost little)",
        WHOLE,
        rare=True,
    )
    log_interval: int = setting(10, "optimiser steps between log lines", COUNT)
    keep_checkpoints: int = setting(3, "newest checkpoints to keep (the best one stays too)", COUNT)
    skip_spikes: float = setting(
        0.0,
        "skip a step whose loss or gradient norm is more than this many times its recent median; 0: none",
        Range("0 or a factor above 1", lambda value: value == 0 or 1 < value < math.inf),
        rare=True,
    )
    go_back_after: int = setting(
        0,
        "skipped steps in a row after which the run goes back to its last good checkpoint and goes on with other data; "
        "0: it ends after 5",
        WHOLE,
        rare=True,
    )
    num_samples: int = setting(4, "texts to write at every validation, with pictures, and at the end; 0: none", WHOLE)
    seed: int = _fixed(0, "seed of the weights, data order, noise and samples", WHOLE)
    warmup_ratio: float = setting(0.05, "share of all optimiser steps spent on warm-up", PROPER_SHARE, of_recipe=True)
    profile: int = _launch(0, "optimiser steps to profile", WHOLE, rare=True)
    verbose: bool = _launch(False, "show every figure of a step, in longer lines")
    deepspeed_config: str = _path("ds_config.json", "the engine's JSON, here or else as shipped")


@dataclasses.dataclass
class EngineSettings:
    """Values that the engine's JSON leaves "auto", and what they follow from where nothing fills them."""

    train_batch_size: int | None = setting(
        None, "texts per optimiser step over all ranks (not given: it follows from the corpus)", COUNT, resume=LAUNCH
    )
    batch_size: int | None = _launch(None, "micro-batch: texts per rank and forward pass", COUNT)
    gradient_accumulation_steps: int | None = _launch(None, "micro-batches per optimiser step", COUNT)
    max_grad_norm: float | None = setting(None, f"gradient clipping (default {DEFAULT_MAX_GRAD_NORM})", CLIPPING)
    lr: float | None = setting(None, "peak learning rate (not given: it follows from recipe and model)", POSITIVE)
    use_amp: bool | None = setting(None, "half precision, on a CPU too (not given: only on a GPU)")
    lr_at_width_192: float = setting(
        3e-3, "peak learning rate of a model 192 wide; that of others follows", POSITIVE, of_recipe=True
    )
    smallest_train_batch: int = setting(4, "train batch for few texts; that for more follows", COUNT, of_recipe=True)
    wanted_steps: int = setting(
        1000, "optimiser steps for which a small corpus is read more than once", COUNT, of_recipe=True
    )
    most_epochs: int = setting(8, "how often it is read at most", COUNT, of_recipe=True)


# The sections of a recipe, and the titles under which the help lists their flags.
SECTIONS = {
    "data": DataSettings,
    "image": ImageSettings,
    "model": ModelSettings,
    "objective": ObjectiveSettings,
    "run": RunSettings,
    "engine": EngineSettings,
}


@dataclasses.dataclass
class TrainConfig(EngineSettings, RunSettings, ObjectiveSettings, ModelSettings, ImageSettings, DataSettings):
    """Every setting of a run except what ds_config.json owns.

    The defaults hold where neither a recipe nor a flag says more; recipes state those of a method together.
    """

    def __post_init__(self):
        """A single data path may be given as it is."""
        if isinstance(self.data_path, str | tuple):
            self.data_path = [self.data_path] if isinstance(self.data_path, str) else list(self.data_path)

    def validate(self) -> None:
        """Raise one UserError listing all settings of a wrong type, out of range or in contradiction."""
        raise_problems("these settings cannot be used:", self.problems())

    def problems(self) -> list[str]:
        """All mistakes in the settings, one sentence each, with the value seen and the fix."""
        fields = dataclasses.fields(self)
        wrong_types = self._each(fields, type_problem)
        if wrong_types:
            return wrong_types  # values of a wrong type cannot be compared
        return [*self._each(fields, value_problem), *self._image_problems(), *self._contradictions()]

    def part(self, kind: type, **more):
        """An object of a dataclass, one of the groups or another: what `more` does not give is as the settings of the
        same names, and as its own defaults where there are none."""
        shared = {field.name for field in dataclasses.fields(kind)} & self.__dataclass_fields__.keys()
        return kind(**{name: getattr(self, name) for name in shared} | more)

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

    def located(self) -> "TrainConfig":
        """The same settings for any working folder: paths that exist are absolute (links stay links)."""
        names = ("data_path", "eval_data_path", "tokenizer_path", "cache_dir", "recipe")
        values = {name: getattr(self, name) for name in names}
        found = {name: absolute(value) for name, value in values.items() if isinstance(value, str)}
        return dataclasses.replace(self, data_path=[absolute(place) for place in self.data_path], **found)

    def save(self, path: str | Path) -> None:
        """Write all settings as JSON."""
        values = {"format": formats.FORMAT, **dataclasses.asdict(self)}
        write_text(path, json.dumps(values, indent=2))

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Settings written by `save`, of this format or an earlier one. UserError if the file is missing or broken, has
        unknown or missing settings, or bad values."""
        values = formats.read(path, formats.CONFIG)
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        # What belongs to a launch is never taken over: a file may be older than such a setting.
        launch = {field.name: field.default for field in dataclasses.fields(cls) if field.metadata["resume"] == LAUNCH}
        values = launch | values
        problems = value_problems(values, fields)
        formats.refuse(path, problems or cls(**values).problems())
        return cls(**values)

    def _each(self, fields, check) -> list[str]:
        """The problems that `check(field, value)` finds, each behind the name of the flag."""
        found = ((field.name, getattr(self, field.name), check(field, getattr(self, field.name))) for field in fields)
        return [f"--{name} {value!r}: {problem}" for name, value, problem in found if problem]

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
        if self.text_key == "":
            problems.append("--text_key is empty: name the key or column that holds the text, or leave it out")
        if not any(self.data_path):
            problems.append("--data_path is missing: name a file or folder of texts, or a data set")
        if self.head == "linear" and self.objective == "ce":
            problems.append("--head linear has no digit posteriors for --objective ce: use mse or elbo")
        if self.head == "linear" and self.timesteps == "entropic":
            problems.append("--head linear has no cross-entropy for --timesteps entropic to follow: use band")
        if self.head == "linear" and self.posterior != "auto":
            problems.append(f"--head linear has no posterior: drop --posterior {self.posterior}")
        if self.head == "linear" and self.local_window:
            problems.append(
                f"--head linear has no posteriors for a local window: drop --local_window {self.local_window}"
            )
        if self.noisy_depth and not self.block_size:
            problems.append(f"--noisy_depth {self.noisy_depth} is for texts from left to right: give --block_size")
        if self.accept_other_texts and self.resume is None:
            problems.append("--accept_other_texts is for a run that goes on: give --resume, or leave it out")
        if self.resume is not None and self.init_from is not None:
            problems.append("--resume continues a run and --init_from starts one: give only one of them")
        return problems
