"""A trained model on disk: checkpoint folders and exports, and all that is needed to read and write text with them.

Both hold `model.json` (shape and codec), weights as safetensors and `text.json` (how texts were made into images).
An export has its tokenizer inside; a checkpoint's stands in the run's folder.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ds_tokimg import checkpoint as checkpoints
from ds_tokimg import tokenizer as tokenizers
from ds_tokimg.batch import PatchLayout
from ds_tokimg.codec import TokenCodec
from ds_tokimg.config import TrainConfig, UserError
from ds_tokimg.model import JiT, JiTConfig

WEIGHTS = ("ema", "trained")


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
    data_path: str  # absolute where it is a local path
    eval_data_path: str | None
    eval_fraction: float
    objective: str
    timesteps: str

    @classmethod
    def of_run(cls, config: TrainConfig, tokenizer, canvas: int) -> TextFormat:
        same = (
            "block_size",
            "packing",
            "enable_condition",
            "use_chat_template",
            "eval_fraction",
            "objective",
            "timesteps",
        )
        return cls(
            max_tokens=config.max_tokens or config.capacity,
            canvas=canvas,
            eos_id=tokenizer.eos_token_id,
            tokenizer=tokenizers.fingerprint(tokenizer),
            data_path=absolute(config.data_path),
            eval_data_path=config.eval_data_path and absolute(config.eval_data_path),
            **{name: getattr(config, name) for name in same},
        )

    def description(self) -> str:
        """As JSON: the content of text.json."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def absolute(data_path: str) -> str:
    """Absolute form of a local path; a hub name stays as it is."""
    return str(Path(data_path).resolve()) if Path(data_path).exists() else data_path


@dataclass
class TrainedModel:
    """A model in eval mode with what belongs to it."""

    path: Path
    model: JiT
    tokenizer: object
    format: TextFormat

    @property
    def layout(self) -> PatchLayout:
        config = self.model.config
        return PatchLayout(self.model.codec, config.img_size, config.patch_size, config.layout)


def load_trained(path: str, weights: str = "ema", device: str = "cpu") -> TrainedModel:
    """Reads a checkpoint, a run's folder (its best checkpoint, else its latest) or an export.

    Args:
        weights: `ema` for the moving average (the trained weights where a run kept none), `trained` for the last.

    Raises UserError when the folder is none of these, or is not whole.
    """
    folder = find_folder(Path(path))
    description = json.loads((folder / "model.json").read_text())
    model = JiT(TokenCodec.from_dict(description["codec"]), JiTConfig(**description["model"]))
    in_checkpoint = (folder / checkpoints.MANIFEST).is_file()
    model.load_state_dict(
        checkpoints.load_weights(folder, weights) if in_checkpoint else load_file(folder / "model.safetensors")
    )
    text_format = TextFormat(**json.loads((folder / "text.json").read_text()))
    tokenizer = tokenizers.load_tokenizer(_tokenizer_folder(folder))
    if tokenizers.fingerprint(tokenizer) != text_format.tokenizer:
        raise UserError(
            f"{_tokenizer_folder(folder)} is not the tokenizer that {folder} was trained with: put the run's own back"
        )
    return TrainedModel(folder, model.eval().to(torch.device(device)), tokenizer, text_format)


def find_folder(path: Path) -> Path:
    """The folder with the weights that a path stands for. Raises UserError when there is none."""
    if not path.is_dir():
        raise UserError(f"--checkpoint {path}: no such folder")
    if (path / "model.json").is_file() and (path / "text.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        for name in ("best", "latest"):
            if (path / "checkpoints" / name).is_file():
                return checkpoints.find(path, name)
    raise UserError(
        f"--checkpoint {path}: neither a checkpoint, nor a run's folder with a finished checkpoint, nor an export"
    )


def _tokenizer_folder(folder: Path) -> Path:
    inside = folder / "tokenizer"
    return inside if inside.is_dir() else folder.parent.parent / "tokenizer"
