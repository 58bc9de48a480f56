"""The command line, its validation and the entry point."""

import dataclasses
import json
import subprocess
import sys

import pytest

from ds_tokimg import __main__ as entry
from ds_tokimg.errors import UserError, nearest
from ds_tokimg.settings.config import TrainConfig, build_parser


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        TrainConfig.from_args(list(argv))
    return str(caught.value).splitlines()[1:]


def test_defaults_come_from_the_dataclass():
    assert TrainConfig.from_args(["--data_path", "x"]) == TrainConfig(data_path="x")


def test_every_field_is_a_flag_with_help():
    text = build_parser("train", "").format_help()
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text or f"--no_{field.name}" in text
        assert len(field.metadata["help"]) > 10


def test_flags_of_every_kind():
    argv = "--data_path x --no_packing --use_amp --ema_decay 0.99 0.999 --lr 3e-4 --resume --radix 5".split()
    config = TrainConfig.from_args([*argv, "--local_rank=3"])
    assert (config.packing, config.use_amp, config.ema_decay) == (False, True, [0.99, 0.999])
    assert (config.lr, config.resume, config.radix) == (3e-4, "latest", 5)
    assert TrainConfig.from_args(["--data_path", "x", "--ema_decay"]).ema_decay == []
    assert TrainConfig.from_args(["--data_path", "x", "--no_use_amp"]).use_amp is False


def test_all_mistakes_are_listed_at_once():
    listed = problems_of(
        *("--moedl", "JiT-B/4", "--token_size", "3", "--head", "linear", "--epochs", "0"),
        *("--lr", "nan", "--layout", "ptach", "--seed=-1", "--ema_decay", "1.5", "--condition_drop", "2"),
    )
    expected = [
        *("unknown argument '--moedl'; did you mean '--model'?", "--layout 'ptach'", "--epochs 0", "--seed -1"),
        *("--condition_drop 2.0", "--lr nan", "--ema_decay [1.5]", "--token_size 3", "--data_path is missing"),
        "--head linear has no digit posteriors",
    ]
    assert len(listed) == len(expected)
    for start, problem in zip(expected, listed, strict=True):
        assert problem.startswith(f"  - {start}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "B/4"], "--model 'B/4': expected a name such as JiT-B/4"),
        (["--model", "JiT-B/0"], "--model 'JiT-B/0': expected a name such as JiT-B/4"),
        (["--img_size", "30"], "--img_size 30 is not a multiple of the patch of --model JiT-XS/4"),
        (["--max_tokens", "5000"], "--max_tokens 5000: an image of --img_size 64 with --token_size 1 holds 4096"),
        (["--resume", "--init_from", "x"], "give only one of them"),
        (["--vocab_size", "100"], "--vocab_size 100: expected at least 257"),
        (["--eval_fraction", "1"], "--eval_fraction 1.0: expected at least 0 and less than 1"),
        (["--head", "linear", "--objective", "mse", "--posterior", "tokens"], "drop --posterior tokens"),
        (["--head", "linear", "--objective", "mse", "--neighbours", "1"], "--head linear has no posteriors to hear"),
        (["--noisy_depth", "1"], "--noisy_depth 1 is for texts from left to right: give --block_size"),
        (["text.txt"], "unknown argument 'text.txt'"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(argv, message):
    (problem,) = problems_of("--data_path", "x", *argv)
    assert message in problem


def test_a_word_for_a_number_is_a_user_error():
    with pytest.raises(UserError, match="--epochs: invalid int value: 'many'"):
        TrainConfig.from_args(["--data_path", "x", "--epochs", "many"])


def test_capacity_and_patch():
    config = TrainConfig(data_path="x", model="JiT-B/8", img_size=64, token_size=2)
    assert (config.patch_size, config.capacity) == (8, 1024)


def test_save_and_load(tmp_path):
    config = TrainConfig(data_path="x", lr=1e-4, ema_decay=[0.9, 0.99], max_tokens=7)
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_load_names_all_that_is_wrong(tmp_path):
    path = tmp_path / "config.json"
    values = dataclasses.asdict(TrainConfig(data_path="x")) | {"epoch": 3, "packing": 1, "seed": True}
    path.write_text(json.dumps(values | {"ema_decay": [None]}))
    with pytest.raises(UserError) as caught:
        TrainConfig.load(path)
    message = str(caught.value)
    assert "unknown key 'epoch'; did you mean 'epochs'?" in message
    assert "packing is 1: expected true or false" in message
    assert "seed is True: expected a whole number" in message
    assert "ema_decay is [None]: expected a list of numbers" in message


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_load_of_a_broken_file(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        TrainConfig.load(path)


def test_nearest_ignores_case_and_far_words():
    assert nearest("Adamw", ["Adam", "AdamW"]) == "; did you mean 'AdamW'?"
    assert nearest("zzz", ["Adam"]) == ""


def test_launchers_put_the_local_rank_in_front():
    assert entry.split_command(["--local_rank=1", "train", "--seed", "3"]) == ("train", ["--seed", "3"])
    assert entry.split_command(["--help"]) == (None, ["--help"])
    assert entry.split_command([]) == (None, [])


def test_unknown_command(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert entry.main(["trian"]) == 2
    assert "error: unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert entry.main(["trian"]) == 2
    assert capsys.readouterr().err == ""


def test_help_lists_the_commands(capsys):
    assert entry.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in entry.COMMANDS)


def test_import_is_lazy_and_complete():
    code = (
        "import sys, ds_tokimg, ds_tokimg.settings.config, ds_tokimg.settings.engine_json, ds_tokimg.__main__\n"
        "assert not {'torch', 'deepspeed', 'numpy', 'transformers'} & set(sys.modules)\n"
        "for name in ds_tokimg.__all__: getattr(ds_tokimg, name)\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
