"""Files that commands write besides what they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ds_tokimg.errors import UserError
from ds_tokimg.settings.files import check_file, check_folder


def check_outputs(json_file: str | None, image_folder: str | None = None) -> None:
    """Before the work: whether the file of --json and the folder of --save_images can be written. Raises UserError."""
    if json_file:
        check_file("--json", json_file)
    if image_folder:
        check_folder("--save_images", image_folder)


def write_json(file: str, value: Any) -> None:
    """The file of --json, and a line that says so. Raises UserError when it cannot be written."""
    try:
        Path(file).write_text(pretty(value) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}") from None
    say_written(file)


def say_written(place: str) -> None:
    """Where something lies now; beside what is printed."""
    print(f"written: {place}", file=sys.stderr, flush=True)


def pretty(value: Any, indent: int = 0) -> str:
    """JSON with a key or an object a line; lists of plain values, such as token ids, stay on one."""
    outer, inner = " " * indent, " " * (indent + 1)
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(str(key), ensure_ascii=False)}: {pretty(value[key], indent + 1)}" for key in value]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{outer}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        return "[\n" + ",\n".join(inner + pretty(item, indent + 1) for item in value) + f"\n{outer}]"
    return json.dumps(value, ensure_ascii=False)
