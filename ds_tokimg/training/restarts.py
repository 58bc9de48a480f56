"""Starts that follow a failure by themselves: `torchrun --max_restarts N`, `launch/train.sh --max_restarts N`.

    OUTPUT/restart.json    {"step": N}: where the last start of a run that may be started again went on from

A start that would go on from there again has gained nothing, and the next one would not either.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ds_tokimg.errors import UserError
from ds_tokimg.settings.files import write_text

FILE = "restart.json"
NUMBER = ("DS_TOKIMG_RESTART", "TORCHELASTIC_RESTART_COUNT")


def number() -> int:
    """Which restart this is, 0 for the first start."""
    return int(next((os.environ[name] for name in NUMBER if name in os.environ), 0))


def flags(argv: list[str]) -> list[str]:
    """The flags of this start: a restart goes on from the newest checkpoint, if there is one. A checkpoint that was
    chosen (`best`, a folder) stays the chosen one."""
    given = [words[-1].removeprefix("--resume=") for words in _resume_flags(argv)]
    if number() == 0 or (given and given[-1] not in ("latest", "auto")):
        return argv
    return [*argv, "--resume", "auto"]


def _resume_flags(argv: list[str]) -> list[list[str]]:
    return [argv[i : i + 2] if argv[i] == "--resume" else [argv[i]] for i in range(len(argv)) if _is_resume(argv[i])]


def _is_resume(word: str) -> bool:
    return word == "--resume" or word.startswith("--resume=")


def may_follow() -> bool:
    """Whether a restart may follow this start."""
    return NUMBER[0] in os.environ or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def note_start(output_dir: str | Path, step: int) -> None:
    """On rank 0, before anything is trained. UserError for a restart when the start before it has not gained a step."""
    path = Path(output_dir) / FILE
    if not may_follow():
        return
    if number() > 0 and path.is_file() and step <= json.loads(path.read_text(encoding="utf-8"))["step"]:
        raise UserError(
            f"restart {number()} would go on from step {step} like the start before it, which gained nothing: given up "
            "(what that one printed says why it failed)"
        )
    write_text(path, json.dumps({"step": step}))
