"""Files that commands write besides what they print."""

from __future__ import annotations

import json
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
    """The file of --json. Raises UserError when it cannot be written."""
    try:
        Path(file).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}") from None
