"""Files that commands write besides what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_tokimg.errors import UserError


def check_outputs(json_file: str | None, image_folder: str | None = None) -> None:
    """Before hours of work: whether the file of --json and the folder of --save_images can be written, which is made.
    Raises UserError otherwise."""
    if json_file and not Path(json_file).parent.is_dir():
        raise UserError(f"--json {json_file} cannot be written: there is no folder {Path(json_file).parent}")
    if json_file and Path(json_file).is_dir():
        raise UserError(f"--json {json_file} cannot be written: it is a folder")
    if image_folder:
        try:
            Path(image_folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save_images {image_folder} cannot be written: {error.strerror}") from None


def write_json(file: str, value: Any) -> None:
    """The file of --json. Raises UserError when it cannot be written."""
    try:
        Path(file).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}") from None
