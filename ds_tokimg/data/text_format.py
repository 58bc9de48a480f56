"""How the texts of a run become images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from ds_tokimg import choices
from ds_tokimg.data.batch import Canvas
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.records import ReadOptions
from ds_tokimg.data.sources import weight_of
from ds_tokimg.errors import shortened, value_problems
from ds_tokimg.settings import formats
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.tokens import tokenizer as tokenizers


@dataclass(frozen=True)
class TextFormat:
    """How texts become images in a run; what evaluation and generation must do alike."""

    max_tokens: int  # tokens an image holds at most
    canvas: int  # patches an answer is written on (models with conditions), else 0
    packing: bool
    enable_condition: bool
    use_chat_template: bool
    eos_id: int
    tokenizer: str  # fingerprint
    data_path: list[str]  # absolute where they are local paths, without weights
    eval_data_path: str | None
    text_key: str | None
    document: str | None
    skip_bad_records: bool
    streaming: bool
    eval_fraction: float
    objective: str
    timesteps: str

    @classmethod
    def of_run(cls, config: TrainConfig, tokenizer, canvas: int) -> TextFormat:
        return config.part(
            cls,
            max_tokens=config.max_tokens or config.capacity,
            canvas=canvas,
            eos_id=tokenizer.eos_token_id,
            tokenizer=tokenizers.fingerprint(tokenizer),
            data_path=absolute(config.data_path),
            eval_data_path=config.eval_data_path and absolute([config.eval_data_path])[0],
        )

    def was_trained_on(self, data_paths: Sequence[str]) -> bool:
        """Whether all of these paths are among the run's own. An export knows their names alone, and goes by them."""
        own = set(self.data_path)
        paths = absolute(data_paths)
        return set(paths) <= own or set(without_places(paths)) <= own

    @property
    def read_options(self) -> ReadOptions:
        return ReadOptions(self.text_key, self.document, self.skip_bad_records)

    @property
    def answers(self) -> Canvas | None:
        """The canvas of a model with conditions."""
        return Canvas(self.canvas, self.eos_id) if self.canvas else None

    def description(self) -> str:
        """As JSON: the content of text.json."""
        return json.dumps({"format": formats.FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_description(cls, values: dict, path) -> TextFormat:
        """`values`: of the file `path`, a text.json, in today's format. Raises UserError for bad ones."""
        formats.refuse(path, value_problems(values, get_type_hints(cls)))
        text_format = cls(**values)
        formats.refuse(path, text_format.problems())
        return text_format

    def problems(self) -> list[str]:
        """Values that no run can have, one sentence each."""
        smallest = {"max_tokens": 1, "canvas": 0, "eos_id": 0}
        problems = [
            f"{name} is {getattr(self, name)}: expected at least {least}"
            for name, least in smallest.items()
            if getattr(self, name) < least
        ]
        if not 0 <= self.eval_fraction < 1:
            problems.append(f"eval_fraction is {self.eval_fraction}: expected at least 0 and less than 1")
        words = {
            "objective": choices.OBJECTIVES,
            "timesteps": choices.TIMESTEPS,
            "document": (None, *choices.DOCUMENTS),
        }
        problems += [
            f"{name} is {shortened(getattr(self, name))}: expected one of {', '.join(map(str, known))}"
            for name, known in words.items()
            if getattr(self, name) not in known
        ]
        return problems


def without_places(data_paths: Sequence[str]) -> list[str]:
    """Paths as others may see them: a file's or folder's name alone; a hub name stays as it is."""
    return [Path(path).name if os.path.isabs(path) else path for path in data_paths]


def absolute(data_paths: Sequence[str]) -> list[str]:
    """Absolute forms of local paths, without their weights; a hub name stays as it is."""
    paths = [weight_of(path)[0] for path in data_paths]
    return [str(Path(path).resolve()) if Path(path).exists() else path for path in paths]


def dataset_of(text_format: TextFormat, layout, tokenizer, data_path, split: str, **more) -> TokenImageDataset:
    """The texts of a path, or of several, in a run's format. more: `cache_dir`, or `load`, of the data set."""
    codec = layout.codec
    return TokenImageDataset(
        data_path,
        tokenizer,
        layout.img_size,
        text_format.use_chat_template,
        text_format.max_tokens,
        token_size=codec.token_size,
        radix=codec.radix,
        palette=codec.palette,
        layout=layout.layout,
        patch_size=layout.patch_size,
        packing=text_format.packing,
        enable_condition=text_format.enable_condition,
        split=split,
        eval_fraction=text_format.eval_fraction,
        read=text_format.read_options,
        **more,
    )
