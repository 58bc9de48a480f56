"""How the texts of a run become images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.data.records import ReadOptions
from ds_tokimg.data.sources import weight_of
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.tokens import tokenizer as tokenizers


@dataclass(frozen=True)
class TextFormat:
    """How texts become images in a run; what evaluation and generation must do alike."""

    max_tokens: int  # tokens an image holds at most
    block_size: int  # patches that lose their noise together, from left to right; 0: all of the image
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

    @property
    def read_options(self) -> ReadOptions:
        return ReadOptions(self.text_key, self.document, self.skip_bad_records)

    def description(self) -> str:
        """As JSON: the content of text.json."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def absolute(data_paths: Sequence[str]) -> list[str]:
    """Absolute forms of local paths, without their weights; a hub name stays as it is."""
    paths = [weight_of(path)[0] for path in data_paths]
    return [str(Path(path).resolve()) if Path(path).exists() else path for path in paths]


def dataset_of(text_format: TextFormat, layout, tokenizer, data_path, split: str, cache_dir) -> TokenImageDataset:
    """The texts of a path, or of several, in a run's format."""
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
        read=text_format.read_options,
    )
