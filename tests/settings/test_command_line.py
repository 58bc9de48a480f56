"""Flags over recipes, over resumed runs; mistakes; help."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_tokimg import __main__ as entry
from ds_tokimg import choices
from ds_tokimg.errors import UserError, nearest
from ds_tokimg.settings.command_line import INSTEAD, build_parser, flags_of, recipe_values, train_config
from ds_tokimg.settings.config import TrainConfig

FIELDS = dataclasses.fields(TrainConfig)


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        train_config(list(argv))
    return str(caught.value).splitlines()[1:]


def config_of(*argv: str) -> TrainConfig:
    return train_config(["--data_path", "x", *argv])


def shown(*argv: str) -> str:
    return build_parser("train", "", list(argv)).format_help()


def has_flag(text: str, name: str) -> bool:
    return any(line.split()[:1] in ([f"--{name}"], [f"--no_{name}"]) for line in text.splitlines())


def test_every_setting_is_a_flag_and_the_short_help_has_the_usual_ones():
    brief, full = shown(), shown("--help-all")
    for field in FIELDS:
        assert has_flag(full, field.name)
        assert has_flag(brief, field.name) != (field.metadata["of_recipe"] or field.metadata["rare"])
    assert sum(has_flag(brief, field.name) for field in FIELDS) <= 37


def test_the_help_shows_the_recipe_that_is_named():
    assert "(default: entropic)" in shown("--help-all")
    assert "(default: noisy)" in shown("--help-all", "--recipe", "left-to-right")


def test_flags_of_every_kind():
    argv = "--no_packing --use_amp --ema_decay 0.99 --lr 3e-4 --radix 5 --local_rank=3".split()
    config = config_of(*argv)
    assert (config.packing, config.use_amp, config.ema_decay) == (False, True, 0.99)
    assert (config.lr, config.resume, config.radix) == (3e-4, None, 5)
    assert config_of("--no_use_amp").use_amp is False
    assert config_of("--resume", "--seed", "3").resume == "latest"


def test_all_mistakes_are_listed_at_once():
    listed = problems_of(
        *("--moedl", "JiT-B/4", "--token_size", "3", "--head", "linear", "--epochs", "0", "--timesteps", "band"),
        *("--lr", "nan", "--layout", "ptach", "--seed=-1", "--ema_decay", "1.5", "--condition_drop", "2"),
    )
    expected = [
        *("unknown argument '--moedl'; did you mean '--model'?", "--condition_drop 2.0", "--layout 'ptach'"),
        *("--ema_decay 1.5", "--epochs 0", "--seed -1", "--lr nan", "--token_size 3", "--data_path is missing"),
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
        (
            ["--img_size", "30", "--model", "JiT-XS/4"],
            "--img_size 30 is not a multiple of the patch of --model JiT-XS/4",
        ),
        (["--max_tokens", "5000"], "--max_tokens 5000: an image of --img_size 64 with --token_size 1 holds 4096"),
        (["--resume", "--init_from", "x"], "give only one of them"),
        (["--accept_other_texts"], "is for a run that goes on: give --resume"),
        (["--vocab_size", "100"], "--vocab_size 100: expected at least 257"),
        (["--eval_fraction", "1"], "--eval_fraction 1.0: expected at least 0 and less than 1"),
        (["--recipe", "reference", "--posterior", "tokens"], "drop --posterior tokens"),
        (["--recipe", "reference", "--local_window", "1"], "--head linear has no posteriors for a local window"),
        (["--noisy_depth", "1"], "--noisy_depth 1 is for texts from left to right: give --block_size"),
        (["--timesteps", "logit_normal"], "choose one of band, uniform, entropic, noisy"),
        (["--seed", "1", "text.txt"], "unknown argument 'text.txt'"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(argv, message):
    (problem,) = problems_of("--data_path", "x", *argv)
    assert message in problem


def test_a_word_for_a_number_is_a_user_error():
    with pytest.raises(UserError, match="--epochs: invalid int value: 'many'"):
        config_of("--epochs", "many")


@pytest.mark.parametrize(
    "flag", [field.name for field in FIELDS if field.metadata["is_path"] and field.name != "data_path"]
)
def test_paths_know_the_home_folder_and_are_not_empty(flag, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.toml").write_text("")
    assert getattr(config_of(f"--{flag}", "~/a.toml"), flag) == str(tmp_path / "a.toml")
    with pytest.raises(UserError, match=f"--{flag}: is empty"):
        config_of(f"--{flag}", "")


def test_several_data_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train_config(["--data_path", "~/a.txt:0.7", "b", "--document", "file", "--seed", "3"])
    assert config.data_path == [f"{tmp_path}/a.txt:0.7", "b"]
    assert train_config(flags_of(config)) == config
    assert TrainConfig(data_path="x").data_path == ["x"]
    with pytest.raises(UserError, match="--data_path: is empty"):
        train_config(["--data_path", "a", ""])


@pytest.mark.parametrize(
    "words", [["--text_key", ""], ["--text_key="], ["--seed", ""], ["--resume", ""], ["--recipe", ""]]
)
def test_an_empty_value_is_a_mistake(words):
    """What an unset variable of a shell leaves behind never means something of its own."""
    with pytest.raises(UserError, match=f"argument {words[0].rstrip('=')}: is empty: give a value, or leave it out"):
        train_config(["--data_path", "x", *words])
    with pytest.raises(UserError, match="--text_key is empty"):
        TrainConfig(data_path="x", text_key="").validate()


# ---- recipes ----


def test_a_recipe_gives_what_flags_leave_open():
    config = config_of("--recipe", "left-to-right", "--noisy_depth", "2")
    assert config.recipe == "left-to-right"
    assert (config.token_size, config.block_size, config.timesteps) == (2, 1, "noisy")
    assert config.noisy_depth == 2
    assert config_of() == config_of("--recipe", "at-once")
    assert (config_of().recipe, config_of().timesteps) == ("at-once", "entropic")


def test_an_image_that_is_too_small_holds_what_it_holds():
    assert config_of("--img_size", "8").max_tokens == 64
    assert config_of().max_tokens == 256


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nmodel = "JiT-S/4"\n[engine]\ntrain_batch_size = 6\n[objective]\npatch_noise = 1\n')
    config = config_of("--recipe", str(path))
    assert (config.model, config.train_batch_size, config.patch_noise) == ("JiT-S/4", 6, 1)
    assert config.timesteps == "band"  # what neither it nor a flag says is as the settings have it


def test_all_mistakes_of_a_recipe_are_listed_at_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'seed = 3\n[modle]\n[model]\nnoisy_deth = 1\nlr = 1e-3\nhead = "lineal"\n'
        '[objective]\nblock_size = "1"\npatch_noise = 2.0\n[run]\nresume = "latest"\n[engine]\nbatch_size = 2\n'
    )
    listed = problems_of("--data_path", "x", "--recipe", str(path))
    expected = [
        "unknown section [seed]",
        "unknown section [modle]; did you mean 'model'?",
        "[model] noisy_deth = 1: unknown setting; did you mean 'noisy_depth'?",
        "[model] lr = 0.001: this setting belongs into the section [engine]",
        "[model] head = 'lineal': choose one of posterior, linear; did you mean 'linear'?",
        "[objective] block_size = '1': expected a whole number",
        "[objective] patch_noise = 2.0: expected between 0 and 1",
        "[run] resume = 'latest': this is for the command line",
        "[engine] batch_size = 2: this is for the command line",
    ]
    assert len(listed) == len(expected)
    for start, problem in zip(expected, listed, strict=True):
        assert problem.startswith(f"  - {start}")


@pytest.mark.parametrize(
    ("recipe", "content", "message"),
    [
        ("at-onec", None, r"no such recipe; did you mean 'at-once'\? \(available: at-once, left-to-right, reference;"),
        ("nowhere.toml", None, "--recipe nowhere.toml: cannot be read"),
        ("mine.toml", b"[model\n", "--recipe mine.toml: not valid TOML"),
        ("mine.toml", b"\xff", "--recipe mine.toml: not UTF-8"),
    ],
)
def test_a_recipe_that_cannot_be_read(recipe, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(recipe).write_bytes(content)
    with pytest.raises(UserError, match=message):
        config_of("--recipe", recipe)


# ---- runs that go on ----


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that has a checkpoint."""
    folder = tmp_path / "the run"
    (folder / "checkpoints" / "step_00000005").mkdir(parents=True)
    flags = ["--recipe", "left-to-right", "--seed", "7", "--output_dir", str(folder), "--log_interval", "3"]
    config_of(*flags, "--train_batch_size", "6", "--epochs", "4", "--max_steps", "5").save(folder / "config.json")
    return folder


def test_a_resumed_run_keeps_its_settings(run):
    config = train_config(["--resume", "latest", "--output_dir", str(run), "--epochs", "5"])
    assert (config.recipe, config.seed, config.log_interval, config.noisy_depth) == ("left-to-right", 7, 3, 1)
    assert (config.epochs, config.max_steps, config.train_batch_size) == (5, None, None)


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000005"])
def test_a_run_that_is_named_goes_on_in_its_own_folder(run, place, tmp_path):
    assert train_config(["--resume", str(run / place)]).output_dir == str(run)
    other = str(tmp_path / "other")
    assert train_config(["--resume", str(run / place), "--output_dir", other]).output_dir == other


def test_auto_goes_on_where_there_is_a_checkpoint(run):
    flags = ["--data_path", "x", "--resume", "auto", "--output_dir", str(run)]
    manifest = run / "checkpoints" / "step_00000005" / "manifest.json"
    manifest.write_text("{}")
    assert train_config(flags).seed == 7
    manifest.unlink()  # one that was never finished
    config = train_config(flags)
    assert (config.seed, config.recipe, config.resume) == (0, "at-once", "auto")


def test_a_run_goes_on_with_its_own_json(run):
    flags = ["--resume", "latest", "--output_dir", str(run)]
    assert train_config(flags).deepspeed_config == "ds_config.json"
    (run / "ds_config_given.json").write_text("{}")
    assert train_config(flags).deepspeed_config == str(run / "ds_config_given.json")
    assert train_config([*flags, "--deepspeed_config", "b.json"]).deepspeed_config == "b.json"


def test_a_resumed_run_cannot_become_another(run):
    flags = [
        "--resume",
        "latest",
        "--output_dir",
        str(run),
        "--recipe",
        "at-once",
        "--seed",
        "8",
        "--log_interval",
        "1",
    ]
    assert problems_of(*flags) == [
        "  - --recipe is 'at-once', the run has 'left-to-right'",
        "  - --seed is 8, the run has 7",
    ]


# ---- flags of settings ----


@pytest.mark.parametrize("recipe", ["at-once", "left-to-right", "reference"])
@pytest.mark.parametrize("more", [[], ["--no_packing", "--use_amp", "--img_size", "8", "--seed", "3", "--lr", "1e-05"]])
def test_flags_give_the_settings_again(recipe, more):
    config = train_config(["--data_path", "a b/c.txt", "--recipe", recipe, *more])
    flags = flags_of(config)
    assert train_config(flags) == config
    assert len(flags) <= 4 + len(more)


def test_flags_of_a_run_whose_recipe_is_gone(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[objective]\nblock_size = 2\n")
    config = config_of("--recipe", str(path))
    path.unlink()
    again = train_config(flags_of(config))
    assert (again.recipe, again.block_size, again.timesteps) == ("at-once", 2, "band")


# ---- the program ----


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


HEAVY = "{'torch', 'deepspeed', 'numpy', 'transformers'} & set(sys.modules)"


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ, stdout=subprocess.DEVNULL)


def test_import_is_lazy_and_complete():
    run_python(
        "import sys, ds_tokimg, ds_tokimg.settings.command_line, ds_tokimg.settings.engine_json, ds_tokimg.__main__\n"
        f"assert not {HEAVY}\n"
        "for name in ds_tokimg.__all__: getattr(ds_tokimg, name)\n"
        "assert 'deepspeed' not in sys.modules\n"
    )


@pytest.mark.parametrize("command", entry.COMMANDS)
def test_help_imports_nothing_that_takes_seconds(command):
    run_python(
        "import sys; from ds_tokimg.__main__ import main\n"
        f"try: main(['{command}', '--help'])\n"
        f"except SystemExit: assert not {HEAVY}, {HEAVY}\n"
    )


def test_a_mistake_in_the_flags_is_told_before_anything_is_imported():
    run_python(
        f"import sys; from ds_tokimg.__main__ import main; assert main(['train', '--seed', 'x']) == 2 and not {HEAVY}"
    )


def test_every_choice_is_known_where_it_is_used():
    from ds_tokimg.model.heads.build import POSTERIORS

    assert set(choices.POSTERIORS) == {"auto", *POSTERIORS}


@pytest.mark.parametrize("recipe", ["at-once", "left-to-right", "reference"])
def test_the_recipes_that_come_along_have_no_problem(recipe):
    values = recipe_values(recipe)
    assert TrainConfig(data_path="x", recipe=recipe, **values).problems() == []
    assert values["model"] == "JiT-XS/2"


@pytest.mark.parametrize("flag", ["--device", "--device=cuda", "--fp16"])
def test_flags_of_other_programs_are_told_what_is_here_instead(flag):
    said = f"unknown argument {flag!r}; instead: {INSTEAD[flag.split('=')[0]]}"
    with pytest.raises(UserError, match=re.escape(said)):
        train_config(["--data_path", "x", flag])
