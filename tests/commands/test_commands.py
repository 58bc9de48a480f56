"""Users' mistakes: one clear message, exit code 2, no traceback, nothing written. And the help of every command."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from ds_tokimg.__main__ import COMMANDS, main
from ds_tokimg.settings.command_line import build_parser, path
from tests.support.damage import seal_again
from tests.support.exports import write_export
from tests.support.runs import small_flags, train_in_ranks

pytestmark = pytest.mark.usefixtures("cache")

SHIPPED = json.loads((Path(__file__).parents[2] / "ds_config.json").read_text())


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train_in_ranks(1, small_flags(corpus, folder, "--max_steps", 1))
    return folder


def refused(capsys, *argv) -> str:
    """The one message of a command that must be refused."""
    assert main([str(word) for word in argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert "did you mean 'train'" in refused(capsys, "trian", "--data_path", "x")


@pytest.mark.parametrize(
    ("json_changes", "expected"),
    [
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"train_batch_size": "8"}, "train_batch_size"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, "train_batch_size"),
        ({"wall_clock_breakdown": "auto"}, "wall_clock_breakdown"),
        ({"zero_optimization": {"stage": 4}}, "stage"),
    ],
    ids=["unknown-key", "wrong-type", "batch-triple", "leftover-auto", "bad-stage"],
)
def test_mistakes_in_the_json(json_changes, expected, corpus, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(SHIPPED | json_changes))
    flags = small_flags(corpus, tmp_path / "run")
    place = flags.index("--train_batch_size")
    del flags[place : place + 2]
    assert expected in refused(capsys, "train", *flags, "--deepspeed_config", path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data_path", "no/such/file.txt"], "no/such/file.txt"),
        (["--max_tokens", "0"], "--max_tokens 0"),
        (["--model", "JiT-XXL/4"], "JiT-XXL/4"),
        (["--model", "JiT-XS/4", "--token_size", "3"], "token_size"),
        (["--radix", "2"], "radix"),
        (["--epochs", "many"], "epochs"),
        (["--objectve", "ce"], "did you mean '--objective'"),
        (["--resume", "latest"], "no checkpoint"),
        (["--deepspeed_config", "none.json"], "none.json"),
        (["--tokenizer_path", "no/such/tokenizer"], "no/such/tokenizer"),
        (["--use_chat_template"], "chat template"),
        (["--lr", "-1"], "--lr"),
        (["--head", "linear", "--objective", "ce"], "linear"),
        (["--recipe", "at_onec"], "did you mean 'at-once'"),
        (["--recipe", "none.toml"], "none.toml"),
        (["--resume", ""], "--resume: is empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_in_the_flags(flags, expected, corpus, tmp_path, capsys):
    message = refused(capsys, "train", *small_flags(corpus, tmp_path / "run"), *flags)
    assert expected in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", "", "empty"),
        ("blank.txt", "\n\n  \n", "no text"),
        ("bad.jsonl", '{"text": "good"}\n{"text": 5}\n', "line 2"),
        ("broken.jsonl", '{"text": "good"}\n{"text": \n', "line 2"),
        ("keys.jsonl", '{"question": "?"}\n', "line 1"),
        ("data.csv", "a,b\n", ".csv"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 14 else None,
)
def test_mistakes_in_the_data(name, content, expected, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(content)
    message = refused(capsys, "train", *small_flags(path, tmp_path / "run"))
    assert name in message and expected in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["generate", "--checkpoint", "nowhere"], "nowhere"),
        (["generate", "--checkpoint", "RUN", "--num_inference_steps", "0"], "steps"),
        (["generate", "--checkpoint", "RUN", "--prompt_file", "nothing.txt"], "nothing.txt"),
        (["generate", "--checkpoint", "RUN", "--infill", "no gap here"], "<gap:8>"),
        (["generate", "--checkpoint", "RUN", "--infill", "nothing <gap:0> here"], "<gap:8>"),
        (["generate", "--checkpoint", "RUN", "--infill", "the <gap:500> house"], "image holds"),
        (["generate", "--checkpoint", "RUN", "--infill", "the <gap:5>", "--prompt", "the"], "--prompt"),
        (["evaluate", "--checkpoint", "nowhere", "--data_path", "x.txt"], "nowhere"),
        (["evaluate", "--checkpoint", "RUN", "--data_path", "nowhere.txt"], "nowhere.txt"),
        (["export", "--checkpoint", "RUN", "--output", "RUN"], "not empty"),
        (["generate", "--checkpoint", ""], "--checkpoint: is empty"),
        (["plan", "--data_path", "nowhere.txt"], "nowhere.txt"),
        (["preview", "--data_path", "nowhere.txt"], "nowhere.txt"),
        (["preview", "--data_path", "x.txt", "--resume", "auto"], "leave --resume out"),
        (["preview", "--data_path", "x.txt", "--num_texts", "-1"], "--num_texts -1"),
        (["plan", "--data_path", "x.txt", "--recipe", "diffusion"], "available: at-once, left-to-right, reference"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_mistakes_with_checkpoints(flags, expected, run, capsys):
    assert expected in refused(capsys, *[str(run) if flag == "RUN" else flag for flag in flags])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_takes_a_path_knows_the_home_folder(command):
    module = importlib.import_module(f"ds_tokimg.commands.{command}")
    parser = build_parser("train", "") if command == "train" else module._parser()
    flags = [a for a in parser._actions if a.metavar in ("PATH", "DIR", "FILE", "FILE.gif", "WHICH")]
    assert flags
    for action in flags:
        assert action.type is path, action.option_strings


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["evaluate", "--checkpoint", "x", "--data_path", "x", "--json", "gone/x.json"], "there is no folder gone"),
        (["plan", "--data_path", "x", "--json", "."], "it is a folder"),
        (["preview", "--data_path", "x", "--json", "file/x.json"], "there is no folder file"),
        (["preview", "--data_path", "x", "--save_images", "file"], "file is no folder"),
        (["export", "--checkpoint", "x", "--output", "file"], "file is no folder"),
        (["export", "--checkpoint", "x", "--output", "file/x"], "file is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_where_to_write_is_checked_before_anything_is_read(flags, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    message = refused(capsys, *flags)
    assert f"{flags[-2]} {flags[-1]} cannot be written" in message and problem in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_says_at_once_that_its_folder_is_a_file(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = small_flags(corpus, tmp_path / "file" / "run", "--cache_dir", tmp_path / "cache")
    assert "is no folder" in refused(capsys, "train", *flags)
    assert not (tmp_path / "cache").exists()  # nothing was tokenised for it


@pytest.mark.parametrize("output", [".", "link", "empty", "new/deeper"])
def test_exports_into_any_place_that_is_empty(output, tmp_path, monkeypatch, capsys):
    """The folder one is in, a link, an empty folder (as a disk of its own is one), one to be made."""
    source, place = write_export(tmp_path / "source"), tmp_path / "place"
    for folder in (place / "empty", place / "here", place / "linked"):
        folder.mkdir(parents=True)
    (place / "link").symlink_to(place / "linked")
    monkeypatch.chdir(place / "here" if output == "." else place)
    assert main(["export", "--checkpoint", str(source), "--output", output]) == 0
    written = sorted(path.name for path in Path(output).iterdir())
    assert written == ["README.md", "manifest.json", "model.json", "model.safetensors", "text.json", "tokenizer"]
    assert main(["generate", "--checkpoint", output, "--num_inference_steps", "1"]) == 0
    assert (place / "link").is_symlink()
    capsys.readouterr()
    assert "exists and is not empty" in refused(capsys, "export", "--checkpoint", source, "--output", output)


def test_a_damaged_checkpoint_is_named(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = next((copy / "checkpoints").glob("step_*/ema_*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "damaged" in refused(capsys, "generate", "--checkpoint", weights.parent)


def test_a_replaced_tokenizer_is_noticed(run, tmp_path, capsys):
    from ds_tokimg.tokens.tokenizer import train_tokenizer

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    checkpoint = next((copy / "checkpoints").glob("step_*"))
    train_tokenizer(["other words entirely"] * 10, 280).save_pretrained(checkpoint / "tokenizer")
    assert "tokenizer.json has" in refused(capsys, "generate", "--checkpoint", checkpoint)
    seal_again(checkpoint)
    assert "is not the tokenizer" in refused(capsys, "generate", "--checkpoint", copy)


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("text.json", lambda text: text.replace('"canvas"', '"canvs": 0, "canvas"'), "unknown key 'canvs'"),
        ("text.json", lambda text: text.replace('"format": 2', '"format": 99'), "written by a newer ds_tokimg"),
        ("text.json", lambda text: text.replace('"max_tokens": 64', '"max_tokens": 0'), "max_tokens is 0"),
        ("text.json", lambda text: "", "not valid JSON"),
        ("model.json", lambda text: text.replace('"depth": 2', '"depth": 0'), "depth is 0"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_broken_files_are_named(command, file, change, expected, run, corpus, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    path = next((folder / "checkpoints").glob(f"step_*/{file}"))
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    data = ["--data_path", corpus] if command == "evaluate" else []
    message = refused(capsys, command, "--checkpoint", path.parent, *data)
    assert message.startswith(f"error: {path}: ") and expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"format": 99}, "written by a newer ds_tokimg"), ({"epoch": 2}, "did you mean 'epochs'")],
    ids=["newer", "unknown"],
)
def test_a_run_with_a_broken_config_is_not_resumed(change, expected, run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert expected in refused(capsys, "train", "--resume", "latest", "--output_dir", folder)
