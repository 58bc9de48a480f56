"""Settings that other dataclasses have fields for."""

from __future__ import annotations

import dataclasses

from ds_tokimg.settings.config import TrainConfig


def settings_of(kind: type, config: TrainConfig) -> dict:
    """The settings that a dataclass `kind` has fields of the same names for, by name."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in names}
