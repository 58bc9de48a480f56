"""The command line of `train` and `plan`: one flag a setting, over a recipe, or over the settings of a resumed run.

No torch, no deepspeed: help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from ds_tokimg import recipes
from ds_tokimg.errors import UserError, alternatives, nearest, raise_problems
from ds_tokimg.settings import formats
from ds_tokimg.settings.config import SECTIONS, TrainConfig
from ds_tokimg.settings.files import absolute, runs_around
from ds_tokimg.settings.manifest import MANIFEST
from ds_tokimg.settings.setting import FIXED, LAUNCH, TEXTS, type_problem, value_problem
from ds_tokimg.settings.start import Start, start_of

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
DEFAULTS = {name: field.default for name, field in FIELDS.items()}
TITLES = {"image": "token images", "engine": 'values that the engine\'s JSON leaves "auto"'}
GIVEN_JSON = "ds_config_given.json"  # of a run's folder: the engine's JSON as its user wrote it


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are UserErrors, so that one rank prints them, like all others."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        """An empty value, which an unset variable of a shell leaves behind, is a mistake before it means anything."""
        flag = ""
        for word in args or []:
            name, _, value = word.partition("=")
            flag = name if word.startswith("--") else flag
            if not word or (word.startswith("--") and "=" in word and not value):
                self.error(f"{f'argument {flag}: ' if flag else 'an argument '}is empty: give a value, or leave it out")
        return super().parse_known_args(args, namespace)


def path(text: str) -> str:
    """The type of a flag that takes a path or a name: `~` is the home folder, and nothing is a mistake."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a path or a name, or leave the flag out")
    return os.path.expanduser(text)


def train_config(argv: list[str]) -> TrainConfig:
    """Settings from the flags of `train`. Raises one UserError that lists every mistake, unknown flags included."""
    return parse(build_parser("train", "Train a language model that writes in pixels.", argv), argv)[0]


def build_parser(command: str, description: str, argv: Sequence[str] = ()) -> Parser:
    """A parser of every setting, to which a command may add flags of its own. The help shows the values of the recipe
    that `argv` names; flags that a recipe fixes, or that few need, are shown by --help-all alone."""
    prog = f"ds-tokimg {command}"
    parser = Parser(prog=prog, usage=f"{prog} --data_path PATH [flags]", description=description, allow_abbrev=False)
    parser.add_argument(
        "--help-all", action="help", help="show all flags, also those that a recipe fixes and that few need"
    )
    shown = DEFAULTS | recipe_values(_recipe_in(argv, prog)) | {"recipe": recipes.DEFAULT}
    for section, settings in SECTIONS.items():
        group = parser.add_argument_group(TITLES.get(section, section))
        for field in dataclasses.fields(settings):
            add_flag = _add_switch if bool in alternatives(field.type) else _add_value
            add_flag(group, field, shown[field.name], hidden=_is_hidden(field) and "--help-all" not in argv)
    # The deepspeed launcher passes it; the rank itself comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _is_hidden(field: dataclasses.Field) -> bool:
    return field.metadata["of_recipe"] or field.metadata["rare"]


# Flags that people try, as other programs and commands have them.
INSTEAD = {
    "--device": "a run takes the accelerators that DeepSpeed finds; DS_ACCELERATOR=cpu keeps to the CPU, "
    "CUDA_VISIBLE_DEVICES=0,1 to some",
    "--checkpoint": "--resume goes on with a run, --init_from starts a new one from a model",
    "--bf16": "--use_amp, or the block bf16 of the engine's JSON",
    "--fp16": "--use_amp, or the block fp16 of the engine's JSON",
    "--max_length": "--max_tokens",
    "--num_gpus": "`RANKS=N bash launch/train.sh`, or `deepspeed --num_gpus N --module ds_tokimg train`",
}


def _instead(flag: str, known: list[str]) -> str:
    return f"; instead: {INSTEAD[flag]}" if flag in INSTEAD else nearest(flag, known)


def parse(parser: Parser, argv: list[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """Settings and the values of the flags that a command added. One UserError lists every mistake.

    What the flags leave out is as in the recipe; with --resume, as in the run's config.json, and then what defines the
    run may not differ from it.
    """
    arguments, unknown = parser.parse_known_args(argv)
    given = {name: vars(arguments).pop(name) for name in FIELDS if name in arguments}
    saved = saved_settings(given)
    start = start_of(given["init_from"]) if "init_from" in given and "resume" not in given else None
    config = TrainConfig(**(DEFAULTS | (_kept(saved) or _of_recipe(given, start)) | given))
    known = [option for action in parser._actions for option in action.option_strings]
    flags = [word for word in unknown if word.startswith("-")] or unknown
    problems = [f"unknown argument {flag!r}{_instead(flag.split('=')[0], known)}" for flag in flags]
    raise_problems("the command line cannot be used:", problems + config.problems())
    changed = [
        f"--{name} is {value!r}, the run has {saved[name]!r}"
        for name, value in given.items()
        if FIELDS[name].metadata["resume"] == FIXED and saved and _located(value) != _located(saved[name])
    ]
    raise_problems("a resumed run goes on as it began (start another with --init_from to change this):", changed)
    return config, arguments


def _located(value):
    """`./x` and `x` are one path."""
    return absolute(value) if isinstance(value, str) else value


def _recipe_in(argv: Sequence[str], prog: str) -> str:
    """The recipe that a command line names; its other flags are not looked at."""
    peek = Parser(prog=prog, add_help=False, allow_abbrev=False)
    peek.add_argument("--recipe", type=path, default=recipes.DEFAULT)
    return peek.parse_known_args(argv)[0].recipe


def _of_recipe(given: dict, start: Start | None = None) -> dict:
    """What a new run has where no flag says otherwise. Images may be too small for as many tokens as a recipe has.

    start: of the model that the run starts from: shape and, unless a recipe is given, method are its own.
    """
    recipe = given.get("recipe", start.recipe if start else recipes.DEFAULT)
    values = recipe_values(recipe) | {"recipe": recipe}
    if start is not None:
        values |= (start.method if "recipe" not in given else {}) | start.shape
    config = TrainConfig(**(DEFAULTS | values | given))
    if config.max_tokens is not None and config.img_size > 0 and config.token_size > 0 and config.capacity:
        values["max_tokens"] = min(config.max_tokens, config.capacity)
    return values


def recipe_values(recipe: str) -> dict:
    """The settings that a recipe states. Raises one UserError that lists all that is wrong in the file."""
    content = recipes.read(recipe)
    problems, values = [], {}
    for section, settings in content.items():
        if section not in SECTIONS or not isinstance(settings, dict):
            problems.append(f"unknown section [{section}]{nearest(section, SECTIONS)} (known: {', '.join(SECTIONS)})")
            continue
        for key, value in settings.items():
            problem = _recipe_problem(section, key, value)
            if problem is None:
                values[key] = value
            else:
                problems.append(f"[{section}] {key} = {value!r}: {problem}")
    raise_problems(f"--recipe {recipe} cannot be used:", problems)
    return values


def _recipe_problem(section: str, key: str, value) -> str | None:
    keys = [field.name for field in dataclasses.fields(SECTIONS[section])]
    if key not in FIELDS:
        return f"unknown setting{nearest(key, FIELDS)}"
    if key not in keys:
        home = next(name for name, group in SECTIONS.items() if key in vars(group)["__dataclass_fields__"])
        return f"this setting belongs into the section [{home}]"
    field = FIELDS[key]
    if not field.metadata["in_recipe"]:
        return "this is for the command line, not for a recipe"
    return type_problem(field, value) or value_problem(field, value)


# ---- a run that goes on ----


def run_folder(resume: str, output_dir: str) -> Path | None:
    """The folder of the run that --resume names; None where there is none (finding the checkpoint says so)."""
    folder = Path(output_dir) if resume in ("latest", "best", "auto") else Path(resume)
    own = [] if (folder / MANIFEST).exists() else [folder]  # a checkpoint holds settings too
    return next((place for place in (*own, *runs_around(folder)) if (place / formats.CONFIG).is_file()), None)


def has_checkpoint(folder: str | Path) -> bool:
    """Whether --resume auto goes on with the run in this folder."""
    return any(Path(folder).glob("checkpoints/step_*/manifest.json"))


def saved_settings(given: dict) -> dict:
    """The settings of the run that the flags resume; empty for a new run."""
    resume, output_dir = given.get("resume"), given.get("output_dir", DEFAULTS["output_dir"])
    if resume is None or (resume == "auto" and not has_checkpoint(output_dir)):
        return {}
    folder = run_folder(resume, output_dir)
    place = folder or Path(resume)
    if not (place / formats.CONFIG).is_file():
        return {}
    if folder is None and "output_dir" not in given:
        raise UserError(
            f"--resume {resume} is a checkpoint outside of its run: name a folder to go on in, --output_dir"
        )
    saved = dataclasses.asdict(TrainConfig.load(place / formats.CONFIG))
    own_json = place / GIVEN_JSON
    return (
        saved
        | {"folder": str(folder or output_dir)}
        | ({"deepspeed_config": str(own_json)} if own_json.is_file() else {})
    )


def _kept(saved: dict) -> dict:
    """Of a run's settings those that it goes on with: all but what belongs to a launch; it stays in its folder."""
    if not saved:
        return {}
    kept = {name: saved[name] for name, field in FIELDS.items() if field.metadata["resume"] != LAUNCH}
    if saved["tokenizer_path"] is not None:  # where it came from may be gone; the run has its own copy
        kept["tokenizer_path"] = str(Path(saved["folder"]) / "tokenizer")
    return kept | {"output_dir": saved["folder"]}


# ---- flags ----


def flags_of(config: TrainConfig, *without: str) -> list[str]:
    """The words of a command line that gives these settings; those `without` are left to the reader."""
    named = config.recipe or recipes.DEFAULT
    try:
        base = _of_recipe({"recipe": named, "img_size": config.img_size, "token_size": config.token_size})
    except UserError:  # a file that is gone since
        named, base = recipes.DEFAULT, _of_recipe({})
    base, words = DEFAULTS | base | {"recipe": recipes.DEFAULT}, []
    values = dataclasses.asdict(config) | {"recipe": named}
    for name, value in values.items():
        if name in without or value is None or value == base[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


def _add_switch(group, field: dataclasses.Field, shown: bool | None, hidden: bool) -> None:
    """Add `--name` and `--no_name`; the help shows the one that changes the default."""
    on, off, text = f"--{field.name}", f"--no_{field.name}", field.metadata["help"]
    on_help, off_help = (argparse.SUPPRESS, f"do not {text}") if shown else (text, argparse.SUPPRESS)
    if hidden:
        on_help = off_help = argparse.SUPPRESS
    options = {"dest": field.name, "default": argparse.SUPPRESS}
    group.add_argument(on, action="store_true", help=on_help, **options)
    group.add_argument(off, action="store_false", help=off_help, **options)


def _add_value(group, field: dataclasses.Field, shown, hidden: bool) -> None:
    """Add `--name VALUE`."""
    kind, data = alternatives(field.type)[0], field.metadata
    options = {} if data["const"] is None else {"nargs": "?", "const": data["const"]}
    if kind == TEXTS:
        kind, options = str, {"nargs": "+"}
    text = data["help"] if shown in (None, "", ()) else f"{data['help']} (default: {shown})"
    usual = "PATH" if data["is_path"] else {int: "N", float: "X", str: "NAME"}[kind]
    metavar = "{" + ",".join(data["choices"]) + "}" if data["choices"] else data["metavar"] or usual
    group.add_argument(
        f"--{field.name}",
        type=path if data["is_path"] else kind,
        default=argparse.SUPPRESS,
        metavar=metavar,
        help=argparse.SUPPRESS if hidden else text.replace("%", "%%"),
        **options,
    )
