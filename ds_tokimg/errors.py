"""Mistakes of a user and failures of a run, each one clear message."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any


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


def value_problems(values: dict[str, Any], fields: dict[str, Any], where: str = "") -> list[str]:
    """What is wrong with the keys of a JSON object and the types of its values, one sentence each.

    Args:
        fields: the keys that it must have, each with its annotation: `int`, `str | None`, `list[int]`, `dict`, ...
        where: what the keys stand in, put before their names: `model.`.
    """
    unknown = [f"unknown key {where + key!r}{nearest(key, fields)}" for key in values if key not in fields]
    missing = [f"the key {where + key!r} is missing" for key in fields if key not in values]
    wrong = [
        f"{where}{key} is {shortened(values[key])}: expected {described(kind)}"
        for key, kind in fields.items()
        if key in values and not has_type(values[key], kind)
    ]
    return unknown + missing + wrong


def has_type(value: object, annotation: Any) -> bool:
    """Whether a value of a JSON file or a flag is of an annotation's type. A whole number is a number, true is none."""
    for member in alternatives(annotation):
        if typing.get_origin(member) is list:
            fits = isinstance(value, list) and all(has_type(item, *typing.get_args(member)) for item in value)
        elif member is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif member is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, member)
        if fits:
            return True
    return False


def described(annotation: Any) -> str:
    """An annotation in a user's words: "a whole number or null"."""
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "an object",
        list: "a list",
        list[str]: "a list of texts",
        types.NoneType: "null",
    }
    return " or ".join(names.get(member, "a list of numbers") for member in alternatives(annotation))


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of `int | None`, or the type itself."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def shortened(value: object) -> str:
    """A value as it is shown in a message, at most a line long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep to be shown"
    return text if len(text) <= 60 else text[:57] + "..."
