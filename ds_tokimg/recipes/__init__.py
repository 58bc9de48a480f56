"""Recipes: settings that make a language model together, each a TOML file to copy and edit.

`--recipe NAME` takes one of the files of this folder, `--recipe FILE.toml` one's own. A file has a section for each
group of settings ([data], [image], [model], [objective], [run], [engine]), whose keys are names of settings. What the
keys mean, and which values are allowed, is checked where the settings are (`settings/command_line.py`).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ds_tokimg.errors import UserError, nearest

FOLDER = Path(__file__).parent
DEFAULT = "at-once"


def names() -> list[str]:
    """Of the recipes that come with the trainer."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(recipe: str) -> dict[str, Any]:
    """The content of a recipe, as TOML gives it. UserError if there is no such recipe, or if it is no TOML."""
    path = _path_of(recipe)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe {recipe}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--recipe {recipe}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--recipe {recipe}: not valid TOML: {error}") from None


def _path_of(recipe: str) -> Path:
    if recipe in names():
        return FOLDER / f"{recipe}.toml"
    if recipe.endswith(".toml") or "/" in recipe:
        return Path(recipe)
    raise UserError(
        f"--recipe {recipe!r}: there is no such recipe{nearest(recipe, names())} "
        f"(available: {', '.join(names())}; a file of your own ends with .toml)"
    )
