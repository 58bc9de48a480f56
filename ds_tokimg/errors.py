"""Mistakes of a user and failures of a run, each one clear message."""

from __future__ import annotations

import difflib
import typing


class UserError(Exception):
    """A mistake of the user: what was wrong, where, how to fix it. Shown without a traceback, exit code 2."""


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` for a misspelt `word`, or an empty string when nothing is close."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


def raise_problems(title: str, problems: list[str]) -> None:
    """Raise one UserError that lists all `problems`; do nothing when there are none."""
    if problems:
        raise UserError(title + "".join(f"\n  - {problem}" for problem in problems))


class TrainingError(RuntimeError):
    """The run itself failed (it is no mistake of the user's): one clear message, exit code 1."""
