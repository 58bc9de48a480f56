"""The formats of the JSON files that the trainer writes: their number, how files are read, and old ones upgraded.

Every such file (`config.json`, `model.json`, `text.json`, `trainer_state.json`, `data.json`) says in which format it
was written, `"format": 2`; files of format 0 do not say it. A file is read by `read` or `read_together`, which hand it
over in today's format, or raise one UserError that names it. Names of parameters belong to a format too:
`parameter_names`.

A new format is a new number here, one function in `_UPGRADES`, and, where layers were renamed, an entry in
`RENAMED_PARAMETERS`. Old files stay readable: tests/formats/ has some of every format.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_tokimg.diffusion.writing import Writing
from ds_tokimg.errors import UserError, has_type, raise_problems, shortened

FORMAT = 2

# The kinds of files, by the name that they have in a run, a checkpoint or an export.
CONFIG = "config.json"
MODEL = "model.json"
TEXT = "text.json"
TRAINER_STATE = "trainer_state.json"
DATA = "data.json"

Files = dict[str, dict]  # the contents of files that belong together, by kind

# Parts of parameters' names that a format changed: {format: {old part: new part}}. A part is one or more whole words
# between dots ("blocks", "attention.qkv"), wherever it stands in a name.
RENAMED_PARAMETERS: dict[int, dict[str, str]] = {
    1: {
        "blocks": "layers",
        "before_embed": "token_shift",
        "read_norm": "context_norm",
        "read_embed": "context_shift",
        "neighbours": "local_window",
    }
}

# Settings that have another name in format 1: {kind of file: {old: new}}.
RENAMED_IN_1 = {CONFIG: {"neighbours": "local_window"}, MODEL: {"neighbours": "local_window"}}
# What format 1 no longer has, and the value that says what today's version does anyway: {kind of file: {key: value}}.
DROPPED_IN_1: dict[str, dict[str, object]] = {
    CONFIG: {"positions": "reading", "self_conditioning": 0.0},
    MODEL: {"positions": "reading", "self_conditioning": False},
}
# Lists of format 0 of which format 1 has the only element, or `0.0` for an empty one.
SINGLE_IN_1 = {CONFIG: "ema_decay", TRAINER_STATE: "ema_decay"}
# How format 0 read its files.
_READING_IN_0: dict[str, object] = {"text_key": None, "document": None, "skip_bad_records": False}
# Settings that format 0 did not have. A run of that time has no recipe; the others say what an open learning rate,
# train batch and number of epochs follow from, and none is open where the run's own JSON goes on.
ADDED_IN_1: dict[str, dict[str, object]] = {
    CONFIG: {
        "recipe": None,
        "lr_at_width_192": 3e-3,
        "smallest_train_batch": 4,
        "wanted_steps": 1000,
        "most_epochs": 20,
        **_READING_IN_0,
    },
    TEXT: _READING_IN_0,
}
# Settings that format 1 did not have: its validations read all held-out texts, it skipped no step for its loss, and its
# texts came from the cache.
# What belongs to a launch alone (`verbose`, `accept_other_texts`) needs no value here, see TrainConfig.load.
ADDED_IN_2: dict[str, dict[str, object]] = {
    CONFIG: {"eval_tokens": 0, "skip_spikes": 0.0, "go_back_after": 0, "streaming": False},
    TEXT: {"streaming": False},
}
# One text of format 0 that is a list of them in format 1.
LISTED_IN_1 = {CONFIG: "data_path", TEXT: "data_path"}
# Up to this vocabulary a posterior that format 0 left open was over whole tokens.
WHOLE_TOKENS_IN_0 = 4096


@dataclass(frozen=True)
class Written:
    """Files of one folder in today's format, and the format that they were written in."""

    format: int
    files: Files


def read(path: str | Path, kind: str) -> dict:
    """One file's values in today's format, without its number. UserError that names it when it cannot be read."""
    return read_together({kind: path}).files[kind]


def read_together(paths: Mapping[str, str | Path]) -> Written:
    """Files of one checkpoint or export, by kind: an upgrade may move a value from one to another.

    Raises one UserError with the file's name for a file that is missing, is not UTF-8, is not JSON, is not an object,
    was written by a newer version, or says what this version no longer can do.
    """
    contents = {kind: read_object(path) for kind, path in paths.items()}
    numbers = {kind: _take_number(values, paths[kind]) for kind, values in contents.items()}
    lowest = min(numbers, key=numbers.get)
    for kind, number in numbers.items():
        if number != numbers[lowest]:
            raise UserError(
                f"{paths[kind]}: format {number}, but {paths[lowest]} is of format {numbers[lowest]}: they were not "
                "written together"
            )
    for upgrade in _UPGRADES[numbers[lowest] :]:
        upgrade(contents, paths)
    return Written(numbers[lowest], contents)


def files_of(folder: Path, *names: str, may_have: Iterable[str] = ()) -> dict[str, Path]:
    """The paths of a folder's files, for `read_together`; of `may_have` those that there are."""
    return {name: folder / name for name in (*names, *(name for name in may_have if (folder / name).is_file()))}


def read_object(path: str | Path) -> dict:
    """A JSON object as it stands in a file. UserError when there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets as deep
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object {{...}}, found {type(values).__name__}")
    return values


def refuse(path: str | Path, problems: list[str]) -> None:
    """Raise a UserError with all problems of a file; do nothing when there are none."""
    if len(problems) == 1:
        raise UserError(f"{path}: {problems[0]}")
    raise_problems(f"{path} cannot be used:", problems)


@contextlib.contextmanager
def blaming(path: str | Path) -> Iterator[None]:
    """Within: values that a constructor does not take are a mistake in a file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def parameter_names(names: Iterable[str], written: int) -> dict[str, str]:
    """{name in a file of the format `written`: today's name} of parameters."""
    names = list(names)
    today = names
    for number in range(written + 1, FORMAT + 1):
        today = [_renamed(name, RENAMED_PARAMETERS.get(number, {})) for name in today]
    return dict(zip(names, today, strict=True))


def _renamed(name: str, parts: dict[str, str]) -> str:
    """All parts at once, longer ones first, so that two may change places."""
    if not parts:
        return name
    longest_first = sorted(parts, key=len, reverse=True)
    pattern = rf"(?<![^.])(?:{'|'.join(map(re.escape, longest_first))})(?![^.])"
    return re.sub(pattern, lambda match: parts[match[0]], name)


def _take_number(values: dict, path: str | Path) -> int:
    number = values.pop("format", 0)
    if not has_type(number, int) or number < 0:
        raise UserError(f"{path}: format is {shortened(number)}: expected a whole number up to {FORMAT}")
    if number > FORMAT:
        raise UserError(
            f"{path}: written by a newer ds_tokimg: format {number}, this one reads up to {FORMAT}; update ds_tokimg"
        )
    return number


def _to_format_1(files: Files, paths: Mapping[str, str | Path]) -> None:
    """0 -> 1, in place. Settings of other names and kinds, see the tables above; a trainer's state always has a
    `schedule`; how texts are written belongs to the model."""
    for kind, values in files.items():
        _settings_to_format_1(_settings(values, kind), kind, paths[kind])
    if TRAINER_STATE in files:
        files[TRAINER_STATE].setdefault("schedule", None)
    if files.get(TEXT, {}).get("timesteps") == "logit_normal":  # no run has it any more; texts are written alike
        files[TEXT]["timesteps"] = "band"
    if MODEL in files:
        files[MODEL]["writing"] = asdict(_writing_in_0(files, paths[MODEL]))


def _settings_to_format_1(settings: dict, kind: str, path: str | Path) -> None:
    for key, value in DROPPED_IN_1.get(kind, {}).items():
        _drop(settings, key, value, path)
    for old, new in RENAMED_IN_1.get(kind, {}).items():
        if old in settings:
            settings[new] = settings.pop(old)
    _add(settings, ADDED_IN_1.get(kind, {}))
    listed = LISTED_IN_1.get(kind)
    if isinstance(settings.get(listed), str):
        settings[listed] = [settings[listed]]
    if kind in SINGLE_IN_1:
        _single(settings, SINGLE_IN_1[kind], path if kind == CONFIG else None)


def _to_format_2(files: Files, paths: Mapping[str, str | Path]) -> None:
    """1 -> 2, in place. Settings that there were not yet."""
    for kind, values in files.items():
        _add(_settings(values, kind), ADDED_IN_2.get(kind, {}))


def _writing_in_0(files: Files, path: str | Path) -> Writing:
    """How a model of format 0 writes: its blocks stood in text.json, and the rest was decided when it was loaded."""
    block_size = files.get(TEXT, {}).pop("block_size", 0)
    try:
        model, codec = files[MODEL]["model"], files[MODEL]["codec"]
        slots = (model["patch_size"] // codec["token_size"]) ** 2
        posterior = model["posterior"] if model["head"] == "posterior" else "none"
        few = codec["vocab_size"] <= WHOLE_TOKENS_IN_0
        whole_tokens = posterior in ("tokens", "tree") or (posterior == "auto" and (few or slots == 1))
        return Writing.of_model(block_size, slots, bool(model["in_turn"]), whole_tokens)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: describes no model of format 0 ({type(error).__name__}: {error})") from None


def _settings(values: dict, kind: str) -> dict:
    """The object of a file that holds the settings; what is no object is refused by who checks its type."""
    inner = {MODEL: "model", TRAINER_STATE: "engine"}.get(kind)
    settings = values if inner is None else values.get(inner)
    return settings if isinstance(settings, dict) else {}


def _add(settings: dict, added: Mapping[str, object]) -> None:
    settings |= {key: value for key, value in added.items() if key not in settings}


def _drop(settings: dict, key: str, value, path: str | Path) -> None:
    found = settings.pop(key, value)
    if found != value:
        raise UserError(
            f"{path}: {key} is {shortened(found)}, which this version no longer has (only {value!r}): use the version "
            "that wrote it"
        )


def _single(settings: dict, key: str, path: str | Path | None) -> None:
    """The first of a list. With `path`, the file of a setting, more of them are a mistake."""
    values = settings.get(key)
    if isinstance(values, list):
        if len(values) > 1 and path is not None:
            raise UserError(
                f"{path}: {key} is {shortened(values)}, of which this version has only one: use the version that wrote "
                "it, or leave the first"
            )
        settings[key] = values[0] if values else 0.0


_UPGRADES = (_to_format_1, _to_format_2)
