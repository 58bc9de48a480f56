"""How the texts of a run become images."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from ds_tokimg.data.batch import Canvas
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.errors import value_problems
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
    data_path: str  # absolute where it is a local path
    eval_data_path: str | None
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
            eval_data_path=config.eval_data_path and absolute(config.eval_data_path),
        )

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
        return problems


def absolute(data_path: str) -> str:
    """Absolute form of a local path; a hub name stays as it is."""
    return str(Path(data_path).resolve()) if Path(data_path).exists() else data_path


def dataset_of(text_format: TextFormat, layout, tokenizer, data_path: str, split: str, cache_dir) -> TokenImageDataset:
    """The texts of a path in a run's format."""
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
        cache_dir=cache_dir,
    )
