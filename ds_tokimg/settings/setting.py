"""What belongs to a setting besides its value: help, range, choices, and what becomes of it when a run is resumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from ds_tokimg.errors import described, has_type, nearest

TEXTS = list[str]  # the type of a flag that takes one or more

# What a resumed run does with a setting.
FIXED = "fixed for the run"  # another value is another run
SAME_TEXTS = "the same texts, wherever they lie"  # known by their content when they are read
MAY_CHANGE = "may change"  # the run's own unless a flag says otherwise
LAUNCH = "belongs to the launch"  # never taken over from the earlier start


class Range(NamedTuple):
    """The numbers that a setting takes, in words and as a check."""

    text: str
    holds: Callable[[float], bool]


COUNT = Range("a whole number of at least 1", lambda value: value >= 1)
WHOLE = Range("0 or more", lambda value: value >= 0)
SHARE = Range("between 0 and 1", lambda value: 0 <= value <= 1)
PROPER_SHARE = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
POSITIVE = Range("a number above 0", lambda value: 0 < value < math.inf)
CLIPPING = Range("0 (no clipping) or more", lambda value: 0 <= value < math.inf)


def setting(
    default,
    help: str,
    range: Range | None = None,
    choices: tuple[str, ...] = (),
    resume: str = MAY_CHANGE,
    **more,
):
    """A dataclass field that is also a flag and a key of recipes.

    more: `const`, its value when the flag stands alone; `is_path`, a path or a name: `~` is expanded, and it is not
    empty; `of_recipe`, what a recipe fixes, and `rare`, what few need: --help-all lists the flag, --help does not;
    `in_recipe=False` for what belongs on the command line alone; `metavar`, what the help calls the value.
    """
    metadata = {"help": help, "range": range, "choices": choices, "resume": resume, "const": None, "is_path": False}
    metadata |= {"of_recipe": False, "rare": False, "in_recipe": True, "metavar": None} | more
    return dataclasses.field(default=default, metadata=metadata)


def type_problem(field: dataclasses.Field, value) -> str | None:
    """What is wrong with the value's type, or None."""
    return None if has_type(value, field.type) else f"expected {described(field.type)}"


def value_problem(field: dataclasses.Field, value) -> str | None:
    """What is wrong with a value of the right type, or None."""
    choices, range_ = field.metadata["choices"], field.metadata["range"]
    if choices and value is not None and value not in choices:
        return f"choose one of {', '.join(choices)}{nearest(value, choices)}"
    if range_ is not None and value is not None and not range_.holds(value):
        return f"expected {range_.text}"
    return None
