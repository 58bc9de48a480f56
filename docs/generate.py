"""Reference pages made from the code: the commands' flags, the settings, the recipes, the engine's JSON.

`python docs/generate.py reference/settings.md` prints one page, for a look without mkdocs.
"""

import argparse
import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_tokimg import recipes
from ds_tokimg.__main__ import COMMANDS
from ds_tokimg.errors import alternatives
from ds_tokimg.settings import command_line, engine_json, engine_schema
from ds_tokimg.settings.config import SECTIONS

TYPES = {int: "whole number", float: "number", str: "text", bool: "switch"}


def pages() -> dict[str, str]:
    """All generated pages: path in the site -> Markdown."""
    return {
        "reference/commands.md": commands(),
        "reference/settings.md": settings(),
        "reference/engine-json.md": engine_keys(),
    }


def table(heads: list[str], lines: list[list]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows) + "\n"


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# ---- commands ----


def commands() -> str:
    """Every command but `train`, whose flags are the settings, with the flags that it takes."""
    text = ["# Commands\n", "`ds-tokimg COMMAND …` and `python -m ds_tokimg COMMAND …` are the same. Each exits with 0"]
    text += ["on success, 2 on a mistake of the user (one message, no traceback), 1 on a failure of its own and 130"]
    text += ["where Ctrl-C ended it; [what they print](console.md) is on a page of its own.\n"]
    text += [table(["command", "what it does"], [[f"`{name}`", what] for name, what in COMMANDS.items()])]
    text += ["## train\n", "Takes every [setting](settings.md) as a flag.\n"]
    for name in COMMANDS:
        if name != "train":
            text += [f"## {name}\n", *_command(name)]
    return "\n".join(text)


def _command(name: str) -> list[str]:
    module = importlib.import_module(f"ds_tokimg.commands.{name}")
    described = inspect.getdoc(module).partition(": ")[2].partition("\n\n")
    settings_too = name in ("plan", "preview")
    parser = module._parser([]) if settings_too else module._parser()
    groups = [group for group in parser._action_groups if not settings_too or group.title == name]
    formatter = parser._get_formatter()
    lines = []
    for group in groups:
        for action in group._group_actions:
            if action.help not in (None, argparse.SUPPRESS) and action.dest != "help":
                flag = ", ".join(action.option_strings)
                lines.append([f"`{flag}{_metavar(action)}`", formatter._expand_help(action), _required(action)])
    also = ["Takes every flag of `train`, and:\n"] if settings_too else []
    heads = ["flag", "meaning", ""]
    return [described[0][:1].upper() + described[0][1:] + "\n", *also, table(heads, lines)]


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    return f" {action.metavar or choices}"


def _required(action: argparse.Action) -> str:
    return "required" if action.required else ""


# ---- settings ----


def settings() -> str:
    """Every setting by section, and what each recipe states."""
    text = [
        "# Settings\n",
        "A setting is a flag of `train` (`--name VALUE`; a switch is `--name` or `--no_name`) and a key of a recipe,",
        "in the section under which it stands here. A flag wins over the recipe, the recipe over the default. Those",
        "marked with a star are listed by `train --help-all` only: a recipe fixes them.\n",
        "What becomes of a setting when a run is resumed:\n",
        table(
            ["on resume", "meaning"],
            [
                [command_line.FIXED, "the run's own; a flag with another value is a mistake"],
                ["the same texts, wherever they lie", "another path may be given; other texts there are refused"],
                ["may change", "the run's own, unless a flag says otherwise"],
                [command_line.LAUNCH, "never taken over: what the flag says now, or the default"],
            ],
        ),
    ]
    stated = {name: command_line.recipe_values(name) for name in recipes.names()}
    for section, group in SECTIONS.items():
        lines = [_setting(field, stated) for field in dataclasses.fields(group)]
        heads = ["flag", "meaning", "values", "default", "on resume"]
        text += [f"## [{section}]\n", inspect.getdoc(group) + "\n", table(heads, lines)]
    return "\n".join([*text, *_recipes(stated)])


def _setting(field: dataclasses.Field, stated: dict[str, dict]) -> list[str]:
    data = field.metadata
    kinds = ["path or name"] if data["is_path"] else [TYPES[kind] for kind in alternatives(field.type) if kind in TYPES]
    values = ", ".join(f"`{choice}`" for choice in data["choices"]) or (data["range"] and data["range"].text)
    in_recipe = any(field.name in values for values in stated.values())
    star = "\\*" if data["of_recipe"] or data["rare"] else ""
    default = "the recipe's" if in_recipe else "" if field.default in (None, "") else f"`{shown(field.default)}`"
    return [f"`--{field.name}`{star}", data["help"], values or " or ".join(kinds), default, data["resume"]]


def shown(value) -> str:
    """A value as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _recipes(stated: dict[str, dict]) -> list[str]:
    """What each recipe states, side by side."""
    names = [name for group in SECTIONS.values() for name in group.__dataclass_fields__]
    keys = [name for name in names if any(name in values for values in stated.values())]
    order = [recipes.DEFAULT, *(name for name in stated if name != recipes.DEFAULT)]
    lines = [[f"`{key}`", *(_stated(stated[name], key) for name in order)] for key in keys]
    return ["## What the recipes state\n", table(["setting", *(f"`{name}`" for name in order)], lines)]


def _stated(values: dict, key: str) -> str:
    return f"`{shown(values[key])}`" if key in values else ""


# ---- the engine's JSON ----


def engine_keys() -> str:
    """Every key that may stand in the engine's JSON, by block, and the file that is shipped."""
    text = [
        "# Engine JSON\n",
        "What `ds_config.json` (or `--deepspeed_config FILE`) may hold: the keys that DeepSpeed reads, and the",
        "values that work with this trainer. An unknown key, a value of a wrong kind and a contradiction are one",
        'message each, before anything starts. `"auto"` is filled from flags, the recipe and the machine; the result',
        "is written to the run.\n",
        "The file that is shipped:\n",
        f"```json\n{engine_json.SHIPPED.read_text(encoding='utf-8').strip()}\n```\n",
        "## Top level\n",
        _keys("", engine_schema.TOP_LEVEL),
    ]
    for block, keys in engine_schema.BLOCKS.items():
        text += [f"## {block}\n", _keys(f"{block}.", keys)]
        for kind, params in {"optimizer": engine_schema.OPTIMIZERS, "scheduler": engine_schema.SCHEDULERS}.get(
            block, {}
        ).items():
            text += [f"### {block}.params of {kind}\n", _keys(f"{block}.params.", params)]
    removed = ", ".join(f"`{name}`" for name in sorted(engine_schema.REMOVED))
    return "\n".join([*text, "## Removed from DeepSpeed\n", f"These keys are refused: {removed}.\n"])


def _keys(prefix: str, keys: dict) -> str:
    refused = {path: why for path, _, why in engine_schema._REFUSED}
    lines = []
    for key, kind in keys.items():
        path = prefix + key
        value = ", ".join(f"`{engine_schema.shown(choice)}`" for choice in kind) if isinstance(kind, tuple) else kind
        if path in engine_schema.AUTO_PATHS | engine_schema.ENGINE_AUTO_PATHS:
            value += ', or `"auto"`'
        notes = [engine_json._NO_EFFECT[path] + " (no effect)"] if path in engine_json._NO_EFFECT else []
        notes += [refused[path]] if path in refused else []
        lines.append([f"`{key}`", value, "; ".join(notes)])
    return table(["key", "value", "note"], lines)


if __name__ == "__main__":
    print(pages()[sys.argv[1]])
