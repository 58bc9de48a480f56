"""Flags without an effect are said aloud, all others are not."""

import dataclasses

import pytest

from ds_tokimg.settings.command_line import train_config
from ds_tokimg.settings.unused import beyond_the_run, unused_flags


def said(*argv: str) -> list[str]:
    flags = list(argv) if "--data_path" in argv else ["--data_path", "x", *argv]
    return unused_flags(train_config(flags), flags)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--eval_data_path", "y", "--eval_fraction", "0.1"], "--eval_fraction has no effect: --eval_data_path names"),
        (["--eval_fraction", "0", "--eval_interval", "5"], "--eval_interval has no effect: there is no validation"),
        (["--eval_fraction", "0", "--eval_tokens=5"], "--eval_tokens has no effect: there is no validation"),
        (
            ["--tokenizer_path", "y", "--vocab_size", "1024"],
            "--vocab_size has no effect: the vocabulary is that of --tok",
        ),
        (["--condition_drop", "0.2"], "--condition_drop has no effect: there are no conditions"),
        (["--lr", "1e-3", "--lr_at_width_192", "1e-3"], "--lr_at_width_192 has no effect: --lr says it"),
        (
            ["--batch_size", "2", "--smallest_train_batch", "2"],
            "--smallest_train_batch has no effect: the batch is given",
        ),
        (["--epochs", "2", "--most_epochs", "2"], "--most_epochs has no effect: --epochs says it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_beside_another_that_overrules_it(argv, expected):
    (line,) = said(*argv)
    assert line.startswith(expected)


def test_flags_for_other_kinds_of_files(tmp_path):
    text, records = tmp_path / "a.txt", tmp_path / "b.jsonl.gz"
    text.write_text("a\n")
    records.write_bytes(b"")
    assert said("--data_path", str(text), "--text_key", "body") == ["--text_key has no effect: plain text has no keys"]
    assert said("--data_path", str(records), "--document", "file")[0].startswith("--document has no effect: the files")
    assert said("--data_path", str(text), str(records), "--text_key", "body", "--document", "file") == []
    assert said("--data_path", str(tmp_path), "--text_key", "body") == []  # a folder: whatever lies in it


def test_what_has_an_effect_is_not_mentioned():
    assert said() == []
    argv = "--vocab_size 300 --eval_fraction 0.1 --eval_interval 5 --eval_tokens 9 --palette id --epochs 2 --lr 1"
    assert said(*argv.split(), "--enable_condition", "--condition_drop", "0.2") == []
    assert said("--init_from", "y", "--vocab_size", "300", "--palette", "id") == []  # a mistake, where they contradict


def test_what_lies_beyond_the_end_of_a_run():
    config = train_config(["--data_path", "x", "--max_steps", "50", "--profile", "10"])
    assert beyond_the_run(config, 100) == []
    (line,) = beyond_the_run(config, 49)
    assert line.startswith("--max_steps 50 has no effect: the schedule has 49 steps")
    (line,) = beyond_the_run(dataclasses.replace(config, max_steps=11), 100)
    assert line.startswith("--profile 10 has no effect")
