"""A trained model on disk: checkpoint folders and exports, and all that is needed to read and write text with them.

Both hold `model.json` (shape, codec and way of writing), weights as safetensors, `text.json` (how texts were made into
images) and `tokenizer/`. A checkpoint of an earlier version has its tokenizer in the run's folder.
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
from ds_tokimg.model.files import check_export, read_weights
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings import formats
from ds_tokimg.settings.files import runs_around
from ds_tokimg.settings.manifest import MANIFEST, entries_of, verify
from ds_tokimg.tokens import tokenizer as tokenizers
from ds_tokimg.tokens.layout import PatchLayout

TOKENIZER = "tokenizer"  # a folder
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
    paths = formats.files_of(folder, formats.MODEL, formats.TEXT)
    written = formats.read_together(paths)
    text_format = TextFormat.from_description(written.files[formats.TEXT], paths[formats.TEXT])
    if is_checkpoint(folder):
        found, source = checkpoints.load_weights(folder, weights), folder
    else:
        source = folder / WEIGHTS_FILE
        found = read_weights(source, written.format)
    model = JiT.from_files(written.files[formats.MODEL], paths[formats.MODEL], found, source)
    home = tokenizer_folder(folder)
    tokenizer = tokenizers.tokenizer_in(home)
    # What can be read may still not be what was written.
    _check_small_files(folder) if is_checkpoint(folder) else check_export(folder)
    if tokenizers.fingerprint(tokenizer) != text_format.tokenizer:
        raise UserError(f"{home} is not the tokenizer that {folder} was trained with: put the run's own back")
    _check_fit(model, tokenizer, text_format, paths[formats.TEXT])
    return TrainedModel(folder, model.eval().to(place), tokenizer, text_format)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder with a model is a checkpoint; else it is an export."""
    return any((folder / name).exists() for name in (checkpoints.TRAINER_STATE, checkpoints.RNG))


def _check_small_files(checkpoint: Path) -> None:
    """UserError where a file of a checkpoint, other than weights and the engine's, is not the one that was written."""
    names = [formats.MODEL, formats.TEXT, formats.TRAINER_STATE]
    others = [name for name in entries_of(checkpoint) if name.endswith(".json") and (checkpoint / name).is_file()]
    names += [*others, *(name for name in entries_of(checkpoint) if name.startswith(f"{TOKENIZER}/"))]
    problem = verify(checkpoint, names)
    if problem:
        raise UserError(f"{checkpoint} is damaged: {problem}; use another checkpoint of the run")


def _check_fit(model: JiT, tokenizer: tokenizers.Tokenizer, text_format: TextFormat, path: Path) -> None:
    """UserError where text.json asks for what the model's images cannot hold."""
    layout = model.layout
    formats.refuse(
        path,
        [
            f"{name} is {value}: at most {most} with this model"
            for name, value, most in (
                ("max_tokens", text_format.max_tokens, layout.codec.capacity(layout.img_size)),
                ("canvas", text_format.canvas, model.num_patches),
                ("eos_id", text_format.eos_id, layout.codec.vocab_size - 1),
            )
            if value > most
        ],
    )
    if tokenizers.vocab_size(tokenizer) > layout.codec.vocab_size:
        raise UserError(
            f"{path.parent / formats.MODEL}: the codec has {layout.codec.vocab_size} tokens, and the tokenizer "
            f"{tokenizers.vocab_size(tokenizer)}: they do not belong together"
        )


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
        raise UserError(f"{path}: {'is no folder' if path.exists() else 'no such folder'}")
    if (path / formats.MODEL).is_file() and (path / formats.TEXT).is_file():
        return path
    if (path / checkpoints.FOLDER).is_dir():
        for name in ("best", "latest"):
            if (path / checkpoints.FOLDER / name).is_file():
                return checkpoints.find(path, name)
    if is_checkpoint(path) or (path / MANIFEST).is_file():
        missing = [name for name in (formats.MODEL, formats.TEXT) if not (path / name).is_file()]
        raise UserError(f"{path} is damaged: {' and '.join(missing)} missing")
    raise UserError(f"{path}: neither a checkpoint, nor a run's folder with a finished checkpoint, nor an export")


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a checkpoint or an export is: inside, or in the run that a checkpoint of an earlier
    version lies in, however it is named (`.`, a link). UserError that says what to do where there is none."""
    inside = folder / TOKENIZER
    if inside.is_dir() or not is_checkpoint(folder):
        return inside
    for run in runs_around(folder):
        if (run / TOKENIZER).is_dir():
            return run / TOKENIZER
    raise UserError(
        f"{folder}: there is no tokenizer in it, nor in a run around it: copy {TOKENIZER}/ of its run into it"
    )
