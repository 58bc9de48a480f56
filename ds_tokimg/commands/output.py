"""Files that commands write besides what they print."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ds_tokimg.errors import UserError


def write_json(file: str, value: Any) -> None:
    """The file of --json. Raises UserError when it cannot be written."""
    try:
        Path(file).write_text(pretty(value) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}") from None


def pretty(value: Any, indent: int = 0) -> str:
    """JSON with a key or an object a line; lists of plain values, such as token ids, stay on one."""
    outer, inner = " " * indent, " " * (indent + 1)
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(str(key), ensure_ascii=False)}: {pretty(value[key], indent + 1)}" for key in value]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{outer}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        return "[\n" + ",\n".join(inner + pretty(item, indent + 1) for item in value) + f"\n{outer}]"
    return json.dumps(value, ensure_ascii=False)


def check_file(flag: str, file: str | Path) -> None:
    """Raises UserError when a file of a flag could not be written, before there is anything to write. What is in it
    stays."""
    path = Path(file)
    is_new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        place = f"there is no folder {path.parent}" if not path.parent.is_dir() else error.strerror
        raise UserError(f"{flag} {file} cannot be written: {place}") from None


def check_folder(flag: str, folder: str | Path) -> None:
    """Makes the folder of a flag; raises UserError when no file could be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from None
