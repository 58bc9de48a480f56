"""The commands that a run ends with: they go on with this run, as a shell reads them."""

import argparse
import dataclasses
import shlex
import sys

import pytest

from ds_tokimg.__main__ import COMMANDS
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.training import automatic
from ds_tokimg.training.next_steps import next_steps

IMAGES = 3000
PROMPT = "Define: a 'floor'\nplease"


def run_of(*argv: str):
    """The settings of a run as they are when it ends."""
    flags = ["--data_path", "my texts/a.txt", "--output_dir", "my runs/first", *argv]
    return automatic.decide(train_config(flags), {}, IMAGES, 1)[0]


def words_of(config, what: str, prompt: str | None = None, step: int = 30) -> list[str]:
    return shlex.split(next_steps(config, IMAGES, prompt, step)[what])


def flags_behind(words: list[str], program: list[str]) -> list[str]:
    assert words[: len(program)] == program
    return words[len(program) :]


@pytest.mark.parametrize("recipe", ["at-once", "left-to-right", "reference"])
def test_scaling_up_trains_the_same_method_on_the_same_texts(recipe):
    said = ["--enable_condition", "--tokenizer_path", "my tokenizer", "--img_size", "32", "--warmup_ratio", "0.1"]
    config = run_of("--recipe", recipe, *said)
    flags = flags_behind(words_of(config, "scale up"), ["deepspeed", "--module", "ds_tokimg", "train"])
    larger = train_config(flags)
    assert (larger.model, larger.output_dir) == ("JiT-B/2", "my runs/first-JiT-B-2")
    assert (larger.lr, larger.train_batch_size, larger.epochs) == (None, None, None)
    same = {name: getattr(config, name) for name in ("model", "output_dir", "lr", "train_batch_size", "epochs")}
    assert dataclasses.replace(larger, **same) == config


def test_scaling_up_keeps_what_was_said_of_length_and_batch():
    config = run_of("--epochs", "30", "--train_batch_size", "12", "--lr", "0.01", "--deepspeed_config", "my.json")
    larger = train_config(flags_behind(words_of(config, "scale up"), ["deepspeed", "--module", "ds_tokimg", "train"]))
    assert (larger.epochs, larger.train_batch_size, larger.lr) == (30, 12, 0.01)
    assert larger.deepspeed_config == "my.json"


def test_levels_that_were_chosen_for_a_vocabulary_go_with_its_tokenizer():
    """A run that began with a model has that model's radix, which another vocabulary may not fit."""
    config = dataclasses.replace(run_of("--vocab_size", "1024"), radix=7)  # 294 ids of a small corpus
    words = words_of(config, "scale up")
    assert words[words.index("--tokenizer_path") + 1] == "my runs/first/tokenizer"


@pytest.mark.parametrize(("size", "larger"), [("XS", "B"), ("B", "L"), ("H", "H")])
def test_the_larger_model_has_the_same_patches(size, larger):
    words = words_of(run_of("--model", f"JiT-{size}/4"), "scale up")
    assert words[words.index("--model") + 1] == f"JiT-{larger}/4"


def test_resuming_goes_on_in_the_folder(tmp_path):
    config = dataclasses.replace(run_of("--batch_size", "2"), output_dir=str(tmp_path / "a run"))
    (tmp_path / "a run").mkdir()
    config.save(tmp_path / "a run" / "config.json")
    flags = flags_behind(words_of(config, "resume"), ["python", "-m", "ds_tokimg", "train"])
    resumed = train_config(flags)
    assert (resumed.resume, resumed.output_dir, resumed.batch_size) == ("latest", config.output_dir, 2)
    assert resumed.recipe == config.recipe and resumed.data_path == config.data_path


def test_resuming_keeps_an_end_that_is_still_ahead():
    """An interrupted run ends where it was to end; one that ended there goes on beyond."""
    config = run_of("--max_steps", "50")
    assert words_of(config, "resume", step=49)[-2:] == ["--max_steps", "50"]
    assert "--max_steps" not in words_of(config, "resume", step=50)
    assert "--max_steps" not in words_of(run_of(), "resume", step=49)


def arguments_of(command: str, words: list[str]) -> argparse.Namespace:
    from importlib import import_module

    assert command in COMMANDS
    return import_module(f"ds_tokimg.commands.{command}")._parser().parse_args(words)


def test_evaluating_and_writing():
    program = ["python", "-m", "ds_tokimg"]
    config = run_of("--cache_dir", "my cache")
    words = flags_behind(words_of(config, "evaluate"), [*program, "evaluate"])
    arguments = arguments_of("evaluate", words)
    assert (arguments.checkpoint, arguments.data_path, arguments.cache_dir) == (
        *(config.output_dir, config.data_path, "my cache"),
    )
    words = flags_behind(words_of(config, "generate"), [*program, "generate"])
    assert arguments_of("generate", words).prompt is None
    words = flags_behind(words_of(config, "generate", PROMPT), [*program, "generate"])
    assert (arguments_of("generate", words).prompt, arguments_of("generate", words).checkpoint) == (
        PROMPT,
        "my runs/first",
    )
    assert words_of(run_of("--eval_fraction", "0"), "evaluate")[-2:] == ["--split", "all"]
    held_out = words_of(run_of("--eval_data_path", "b c.txt"), "evaluate")
    assert held_out[held_out.index("--data_path") + 1] == "b c.txt"


def test_the_program_is_named_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ds-tokimg", "train"])
    assert words_of(run_of(), "resume")[:2] == ["ds-tokimg", "train"]
