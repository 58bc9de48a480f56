"""A model on the disk: model.json, its shape and codec, and model.safetensors, its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_type_hints

from torch import Tensor

from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.errors import UserError, value_problems
from ds_tokimg.model.config import JiTConfig
from ds_tokimg.settings import formats, tensors
from ds_tokimg.settings.manifest import MANIFEST, verify
from ds_tokimg.tokens.codec import TokenCodec

WEIGHTS = "model.safetensors"


def codec_of(values: dict, path: Path) -> TokenCodec:
    """The codec in a model.json, `values` in today's format of the file `path`. UserError where it says none."""
    _check_parts(values, path)
    with formats.blaming(path):
        return TokenCodec.from_dict(values["codec"])


def shape_of(values: dict, path: Path) -> JiTConfig:
    """The shape in a model.json, as above."""
    _check_parts(values, path)
    formats.refuse(path, value_problems(values["model"], get_type_hints(JiTConfig), "model."))
    return JiTConfig(**values["model"])


def writing_of(values: dict, path: Path) -> Writing:
    """How texts are written by the model of a model.json, as above."""
    _check_parts(values, path)
    formats.refuse(path, value_problems(values["writing"], get_type_hints(Writing), "writing."))
    with formats.blaming(path):
        return Writing(**values["writing"])


def _check_parts(values: dict, path: Path) -> None:
    formats.refuse(path, value_problems(values, {"model": dict, "codec": dict, "writing": dict}))


def check_export(folder: Path) -> None:
    """UserError where a file of an export is not the one that was written. Earlier ones have no checksums."""
    problem = verify(folder) if os.path.lexists(folder / MANIFEST) else None
    if problem:
        raise UserError(f"{folder} is damaged: {problem}; export the model again, or fetch another copy")


def read_weights(path: Path, written: int) -> dict[str, Tensor]:
    """The weights of a file by today's names. `written`: the format of the files beside it.

    Raises UserError when there is no such file, or it is damaged.
    """
    weights = tensors.read_weights(path)
    names = formats.parameter_names(weights, written)
    return {names[name]: value for name, value in weights.items()}


def check_weights(own: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    """UserError that names the file where weights are not those of a model whose own (without data) are given."""
    for name in {**own, **weights}:
        shapes = [tuple(values[name].shape) if name in values else "none" for values in (weights, own)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: these are the weights of another model than {formats.MODEL} says: {name} has shape "
                f"{shapes[0]} there and {shapes[1]} here"
            )
