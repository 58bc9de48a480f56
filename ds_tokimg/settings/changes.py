"""What a launch that goes on with a run does otherwise than the run did before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_tokimg.errors import shortened
from ds_tokimg.settings import engine_json, formats
from ds_tokimg.settings.command_line import GIVEN_JSON
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.engine_schema import shown
from ds_tokimg.settings.files import file_of
from ds_tokimg.settings.setting import LAUNCH

# Named and checked elsewhere: the texts are known by their content, the JSON by what is in it.
_NOT_HERE = ("data_path", "eval_data_path", "deepspeed_config")


def changes(config: TrainConfig, raw: dict, checkpoint: Path) -> list[str]:
    """Settings and entries of the engine's JSON that take effect from here on, one sentence each.

    Args:
        config, raw: of this launch, with nothing left open but what the JSON leaves open.
        checkpoint: the folder that it goes on from; it holds what the run had.
    """
    found = []
    file = file_of(checkpoint, formats.CONFIG)
    if file.is_file():
        before = TrainConfig.load(file)
        for field in dataclasses.fields(config):
            old, new = getattr(before, field.name), getattr(config, field.name)
            if field.metadata["resume"] != LAUNCH and field.name not in _NOT_HERE and old != new:
                found.append(f"from here on --{field.name} is {shortened(new)}; it was {shortened(old)}")
    file = file_of(checkpoint, GIVEN_JSON)
    if file.is_file():
        found += _json_changes(dict(_entries(engine_json.read(str(file)))), dict(_entries(raw)))
    return found


def _json_changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key, value in now.items():
        if key not in before:
            yield f"from here on the engine's JSON has {key} {shown(value)}"
        elif before[key] != value:
            yield f"from here on {key} of the engine's JSON is {shown(value)}; it was {shown(before[key])}"
    left_out = [key for key in before if key not in now]
    if left_out:
        yield f"from here on the engine's JSON leaves out {', '.join(left_out)}"


def _entries(values: dict, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all that is no object."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _entries(value, f"{path}{key}.")
        else:
            yield path + key, value
