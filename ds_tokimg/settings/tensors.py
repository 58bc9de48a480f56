"""Files of tensors, read without trusting them: nothing in them is run, and a broken one is one sentence."""

from __future__ import annotations

import pickle
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_tokimg.errors import UserError


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, readable by those who may read other new files: the library makes one for its owner alone."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(mode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of floating-point numbers. UserError where it is none, or not whole."""
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: cannot be read (there is no such file)") from None
    except Exception as error:  # the library raises what its parser and torch raise
        raise UserError(f"{path}: these are no whole weights ({_first_line(error)})") from None
    for name, value in weights.items():
        if not value.is_floating_point():
            raise UserError(f"{path}: {name} holds {value.dtype}: these are no weights")
    return weights


def read_pickled(path: Path, classes: Sequence[Any] = (), mmap: bool = False) -> Any:
    """What `torch.save` wrote: tensors, plain values, and objects of `classes`. On the CPU.

    Raises UserError that names the file where it holds anything else, which is not made, or is not whole.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError as error:
        # What torch says besides is how to read the file without care.
        found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        what = found[1] if found else type(error).__name__
        raise UserError(
            f"{path}: holds something else than tensors and plain values, and is not read ({what})"
        ) from None
    except Exception as error:  # a torn archive raises what torch's reader raises
        raise UserError(f"{path}: no whole file of tensors ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
