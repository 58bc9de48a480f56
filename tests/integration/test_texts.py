"""Runs on every kind of texts: several paths with weights, folders with other files, conversations, no validation."""

import gzip
import json
import shutil

import pytest

from ds_tokimg.__main__ import main
from ds_tokimg.errors import UserError
from ds_tokimg.settings.command_line import train_config
from tests.support.runs import learned, metrics, small_flags, train_in_ranks, write_corpus

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    """A text file, and a folder of compressed lines of JSON with a bad one among other files."""
    folder = tmp_path_factory.mktemp("texts")
    corpus = write_corpus(folder)
    shards = folder / "shards"
    shards.mkdir()
    lines = [json.dumps({"body": f"shard {i} of the house by the sea."}) for i in range(40)]
    for number in range(2):
        packed = gzip.compress("\n".join([*lines[number::2], "oops"]).encode())
        (shards / f"{number}.JSONL.gz").write_bytes(packed)
    (shards / "README.txt").write_text("about the shards\n")
    (shards / "archive.zip").write_text("")
    return [str(corpus), str(shards)]


READ = ("--text_key", "body", "--skip_bad_records")


def test_a_run_on_weighted_paths_resumes_exactly_and_says_what_it_left_out(paths, tmp_path, capsys):
    weighted = [f"{paths[0]}:0.5", f"{paths[1]}:0.5"]

    def flags(folder, *more) -> list[str]:
        given = small_flags(
            weighted[0], tmp_path / folder, *READ, "--recipe", "reference", "--eval_interval", 100, *more
        )
        given.insert(given.index(weighted[0]) + 1, weighted[1])
        return given

    printed = train_in_ranks(1, flags("whole", "--max_steps", 8))
    for note in (
        f"note: {paths[1]}: not read: 1 .txt (README.txt), 1 .zip (archive.zip)",
        f"note: {paths[1]}: 2 bad record(s) left out, for example: {paths[1]}/0.JSONL.gz, line 21: invalid JSON",
    ):
        assert printed.count(note) == 1
    train_in_ranks(1, flags("cut"))
    train_in_ranks(2, ["--resume", "latest", "--output_dir", str(tmp_path / "cut"), "--max_steps", "8"])
    whole, cut = (learned(metrics(tmp_path / name)) for name in ("whole", "cut"))
    assert [row["valid_tokens"] for row in whole] == [row["valid_tokens"] for row in cut]
    for one, other in zip(whole, cut, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for flag, value in (("text_key", "other"), ("document", "file")):
        with pytest.raises(UserError, match=f"--{flag} is .*, the run has "):
            train_config(["--resume", "latest", "--output_dir", str(tmp_path / "cut"), f"--{flag}", value])
    assert main(["evaluate", "--checkpoint", str(tmp_path / "cut"), "--data_path", *reversed(paths)]) == 0
    out = capsys.readouterr().out
    assert "2 bad record(s)" in out
    held_out = int(out.split("images")[0].split()[-1])
    assert 0 < held_out < 30  # the held-out texts of the same data, read in the same way
    assert main(["evaluate", "--checkpoint", str(tmp_path / "cut"), "--data_path", paths[0]]) == 0
    assert 0 < int(capsys.readouterr().out.split("images")[0].split()[-1]) < held_out


def test_plan_says_what_is_left_out(paths, capsys):
    flags = ["--model", "JiT-XS/4", "--img_size", "16", "--vocab_size", "300", "--recipe", "reference", *READ]
    assert main(["plan", "--data_path", paths[1], *flags]) == 0
    out = capsys.readouterr().out
    assert "not read: 1 .txt (README.txt), 1 .zip (archive.zip)" in out and "2 bad record(s)" in out


def test_a_run_without_validation(paths, tmp_path):
    printed = train_in_ranks(1, small_flags(paths[0], tmp_path / "run", "--eval_fraction", 0))
    assert "0 validation images" in printed
    assert not any("val_loss" in row for row in metrics(tmp_path / "run"))


def test_a_cloned_repository_validates_on_its_validation_split(paths, tmp_path):
    repository = tmp_path / "clone" / "data"
    repository.mkdir(parents=True)
    shutil.copy(paths[0], repository / "train-00000-of-00001.txt")
    (repository / "validation-00000-of-00001.txt").write_text("the old house by the sea where it slept.\n" * 9)
    (repository / "test-00000-of-00001.txt").write_text("never seen\n" * 100)
    printed = train_in_ranks(1, small_flags(repository.parent, tmp_path / "run"))
    assert "trains on its train split" in printed and "its validation split is used for validation" in printed
    evaluated = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--data_path", str(repository.parent)]
    figures = tmp_path / "figures.json"
    assert main([*evaluated, "--json", str(figures)]) == 0
    row = metrics(tmp_path / "run")[-1]
    assert json.loads(figures.read_text())["bytes"] == 9 * len("the old house by the sea where it slept.")
    assert json.loads(figures.read_text())["bits_per_byte"] == pytest.approx(row["val_bits_per_byte"], rel=1e-5)


def test_conversations_and_prompts_that_are_cut(tmp_path, capsys):
    rows = [
        [
            ("user", "the cat sat on a mat " * 20),
            ("assistant", "and the dog ran"),
            ("user", "to the"),
            ("assistant", "sea"),
        ],
        *([("user", f"the house {i}"), ("assistant", "by the sea")] for i in range(60)),
    ]
    path = tmp_path / "chats.jsonl"
    messages = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    path.write_text("\n".join(map(json.dumps, messages)))
    printed = train_in_ranks(1, small_flags(path, tmp_path / "run", "--enable_condition", "--eval_fraction", 0))
    assert "note: 1 of 61 prompts are longer than max_tokens, 64; of these the last 64 tokens are seen" in printed
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfthe house\x0con\r\nthe\xe2\x80\xa8sea " + b"the cat sat " * 60 + b"\n")
    asked = [
        "generate",
        "--checkpoint",
        str(tmp_path / "run"),
        "--prompt_file",
        str(prompts),
        "--num_inference_steps",
        "1",
    ]
    assert main([*asked, "--json", str(tmp_path / "texts.json")]) == 0
    answered = [text["prompt"] for text in json.loads((tmp_path / "texts.json").read_text())]
    assert answered == ["the house\x0con", "the\u2028sea " + "the cat sat " * 60]
    assert "the last 64 of them are seen" in capsys.readouterr().err
