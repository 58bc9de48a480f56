"""Files that commands write besides what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_tokimg.errors import UserError


def write_json(file: str, value: Any) -> None:
    """The file of --json. Raises UserError when it cannot be written."""
    try:
        Path(file).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written: {error.strerror}") from None
