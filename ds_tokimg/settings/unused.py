"""Flags that have no effect beside others: nothing that a user says is ignored without a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_tokimg.settings.command_line import FIELDS
from ds_tokimg.settings.config import TrainConfig

PLAIN_TEXT = (".txt", ".md")
PACKED = (".gz", ".bz2", ".xz", ".zst")


def given_in(argv: Sequence[str]) -> set[str]:
    """The settings that a command line names."""
    flags = {word.split("=")[0] for word in argv if word.startswith("--")}
    return {name for name in FIELDS if f"--{name}" in flags or f"--no_{name}" in flags}


def unused_flags(config: TrainConfig, argv: Sequence[str]) -> list[str]:
    """What is to be said of the flags of a command line, one sentence each."""
    given = given_in(argv)
    reasons = {name: reason for name, reason in _reasons(config, given).items() if reason and name in given}
    return [f"--{name} has no effect: {reason}" for name, reason in reasons.items()]


def _reasons(config: TrainConfig, given: set[str]) -> dict[str, str | bool]:
    """Why a flag would have no effect, in place of False where it has one."""
    no_validation = config.eval_fraction == 0 and config.eval_data_path is None and "there is no validation"
    kinds = {_ending(path) for path in config.data_path}
    return {
        "eval_fraction": config.eval_data_path is not None and "--eval_data_path names the validation texts",
        "eval_interval": no_validation,
        "eval_tokens": no_validation,
        "vocab_size": config.tokenizer_path is not None and "the vocabulary is that of --tokenizer_path",
        "condition_drop": not config.enable_condition and "there are no conditions without --enable_condition",
        "text_key": None not in kinds and kinds <= set(PLAIN_TEXT) and "plain text has no keys",
        "document": None not in kinds and not kinds & set(PLAIN_TEXT) and "the files hold records, not plain text",
        "cache_dir": config.streaming and "--streaming caches nothing",
        "lr_at_width_192": "lr" in given and "--lr says it",
        "smallest_train_batch": bool(given & {"train_batch_size", "batch_size"}) and "the batch is given",
        "wanted_steps": "epochs" in given and "--epochs says it",
        "most_epochs": "epochs" in given and "--epochs says it",
    }


def _ending(path: str) -> str | None:
    """Of a file's name without that of a packer; None for what is no file."""
    file = Path(path)
    if not file.is_file():
        return None
    return Path(file.stem if file.suffix.lower() in PACKED else file.name).suffix.lower()


def beyond_the_run(config: TrainConfig, steps: int) -> list[str]:
    """The same for a run whose schedule has so many steps."""
    notes = []
    if config.max_steps is not None and config.max_steps > steps:
        notes.append(f"--max_steps {config.max_steps:,} has no effect: the schedule has {steps:,} steps (--epochs)")
    last = min(steps, config.max_steps or steps)
    if config.profile and config.profile + 2 > last:
        notes.append(f"--profile {config.profile} has no effect: it takes two steps more, and the run has {last:,}")
    return notes
