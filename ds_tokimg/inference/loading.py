"""A trained model on disk: checkpoint folders and exports, and all that is needed to read and write text with them.

Both hold `model.json` (shape, codec and way of writing), weights as safetensors and `text.json` (how texts were made
into images). An export has its tokenizer inside; a checkpoint's stands in the run's folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_tokimg.data.text_format import TextFormat
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.errors import UserError
from ds_tokimg.model.files import WEIGHTS as WEIGHTS_FILE
from ds_tokimg.model.files import load_weights, read_weights
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings import formats
from ds_tokimg.tokens import tokenizer as tokenizers
from ds_tokimg.tokens.layout import PatchLayout

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class TrainedModel:
    """A model in eval mode with what belongs to it."""

    path: Path
    model: JiT
    tokenizer: tokenizers.Tokenizer
    format: TextFormat

    @property
    def layout(self) -> PatchLayout:
        return self.model.layout

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_trained(path: str, weights: str = "ema", device: str = "cpu") -> TrainedModel:
    """Reads a checkpoint, a run's folder (its best checkpoint, else its latest) or an export.

    Args:
        weights: `ema` for the moving average (the trained weights where a run kept none), `trained` for the last.
        device: as torch names it, or "auto", see `choose_device`.

    Raises UserError for a device that is not there, and when the folder is none of these, or is not whole.
    """
    place, folder = choose_device(device), find_folder(Path(path))
    written = formats.read_together(formats.files_of(folder, formats.MODEL, formats.TEXT))
    model = JiT.from_description(written.files[formats.MODEL], folder / formats.MODEL)
    text_format = TextFormat.from_description(written.files[formats.TEXT], folder / formats.TEXT)
    if (folder / checkpoints.MANIFEST).is_file():
        load_weights(model, checkpoints.load_weights(folder, weights), folder)
    else:
        load_weights(model, read_weights(folder / WEIGHTS_FILE, written.format), folder / WEIGHTS_FILE)
    tokenizer = tokenizers.load_tokenizer(_tokenizer_folder(folder))
    if tokenizers.fingerprint(tokenizer) != text_format.tokenizer:
        raise UserError(
            f"{_tokenizer_folder(folder)} is not the tokenizer that {folder} was trained with: put the run's own back"
        )
    return TrainedModel(folder, model.eval().to(place), tokenizer, text_format)


def choose_device(name: str = "auto") -> torch.device:
    """A torch device; "auto" is this machine's accelerator if torch finds one, else the CPU. Raises UserError for one
    that is not there."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the device {name!r} cannot be used: {reason}; cpu and auto always work") from None


def fetch(path_or_name: str | Path) -> Path:
    """A local folder as it is, or the copy of a model on the Hugging Face hub (`owner/name`), downloaded once.

    Raises UserError when it is neither.
    """
    if Path(path_or_name).expanduser().exists() or not _HUB_NAME.fullmatch(str(path_or_name)):
        return Path(path_or_name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_name)))
    except Exception as error:  # the library raises whatever the network raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path_or_name}: no such folder, and not found on the Hugging Face hub: {reason}") from error


def find_folder(path: Path) -> Path:
    """The folder with the weights that a path stands for. Raises UserError when there is none."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if (path / formats.MODEL).is_file() and (path / formats.TEXT).is_file():
        return path
    if (path / "checkpoints").is_dir():
        for name in ("best", "latest"):
            if (path / "checkpoints" / name).is_file():
                return checkpoints.find(path, name)
    raise UserError(f"{path}: neither a checkpoint, nor a run's folder with a finished checkpoint, nor an export")


def _tokenizer_folder(folder: Path) -> Path:
    inside = folder / "tokenizer"
    return inside if inside.is_dir() else folder.parent.parent / "tokenizer"
