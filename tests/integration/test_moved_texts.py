"""A run goes on, and is measured, with the same texts wherever they lie; with other texts only where that is said."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ds_tokimg.__main__ import main
from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import FIELDS, train_config
from ds_tokimg.settings.setting import FIXED
from ds_tokimg.training.run import train
from tests.support.damage import seal_again
from tests.support.distributed import run_ranks
from tests.support.runs import learned, metrics, small_flags, train_in_ranks, write_corpus

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with corpus.txt and `run`, which was trained there for four steps, with a relative path."""
    folder = tmp_path_factory.mktemp("home")
    write_corpus(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        train_in_ranks(1, small_flags("./corpus.txt", "run"))
        train_in_ranks(1, small_flags("corpus.txt", "whole", "--max_steps", 6))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(home, tmp_path, monkeypatch) -> Path:
    """A copy of the run, its data under another name and in another folder; the present folder holds neither."""
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "texts").mkdir()
    shutil.copy(home / "corpus.txt", tmp_path / "texts" / "renamed.txt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def resumed(place: Path, *more) -> list[str]:
    return ["--resume", "latest", "--output_dir", str(place / "run"), "--max_steps", "6", *map(str, more)]


def forget_the_data(place: Path) -> None:
    """As if the data had been where they no longer are."""
    config = place / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"data_path": [str(place / "gone.txt")]}))


def refused(capsys, argv) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_a_run_goes_on_from_any_folder(home, place):
    assert train_config(resumed(place)).data_path == [str(home / "corpus.txt")]
    assert train_config(resumed(place, "--data_path", "../x.txt")).data_path == ["../x.txt"]


@pytest.mark.parametrize("how", ["moved", "shards"])
def test_the_same_texts_elsewhere_are_the_same_run(how, home, place):
    """Renamed and moved, named from another folder; or cut into files of other formats."""
    forget_the_data(place)
    data = Path("..") / "texts" / "renamed.txt"
    if how == "shards":
        lines = data.read_text().splitlines(keepends=True)
        data = place / "shards"
        data.mkdir()
        (data / "0.txt").write_text("".join(lines[:100]))
        (data / "1.jsonl").write_text("".join(json.dumps(line.rstrip("\n")) + "\n" for line in lines[100:]))
    train_in_ranks(1, resumed(place, "--data_path", data))
    assert learned(metrics(place / "run")) == learned(metrics(home / "whole"))
    assert json.loads((place / "run" / "config.json").read_text())["data_path"] == [str(data.resolve())]


def test_where_the_texts_have_gone_is_asked(place, capsys):
    forget_the_data(place)
    message = refused(capsys, ["train", *resumed(place)])
    assert str(place / "gone.txt") in message and "--data_path NEW" in message and "beside --resume" in message


def test_other_texts_are_refused_or_accepted_aloud(home, place, capsys):
    """One text more: another order, other held-out texts, and no figure to compare a validation with."""
    grown = place / "texts" / "renamed.txt"
    with open(grown, "a") as file:
        file.write("one more text about a boat\n")
    before = metrics(place / "run")
    message = refused(capsys, ["train", *resumed(place, "--data_path", grown)])
    assert "not the texts that the run was trained on" in message and "--accept_other_texts" in message
    assert "the training texts, or their order, are others" in message
    assert metrics(place / "run") == before
    state = place / "run" / "checkpoints" / "step_00000004" / "trainer_state.json"
    assert json.loads(state.read_text())["best_step"] in (None, 4)
    printed = train_in_ranks(1, resumed(place, "--data_path", grown, "--accept_other_texts"))
    assert "note: other texts than before, as accepted: the training texts, or their order, are others" in printed
    assert (place / "run" / "checkpoints" / "best").read_text().strip() == "step_00000006"  # the first of the new ones
    assert "best so far" in printed or "(best)" in printed
    for data in (grown, home / "corpus.txt"):  # the model knows both
        assert main(["evaluate", "--checkpoint", str(place / "run"), "--data_path", str(data), "--split", "train"]) == 0
        counts = capsys.readouterr().out.split("measured on the training texts: ")[1].split(" ")
        assert counts[0] == counts[3]  # all of them
    assert "other texts" not in train_in_ranks(1, resumed(place))  # these are the run's texts now


def measured(capsys, checkpoint: Path, data: Path, *more) -> tuple[str, dict]:
    figures = checkpoint.parent / "figures.json"
    argv = ["evaluate", "--checkpoint", checkpoint, "--data_path", data, "--json", figures, *more]
    assert main([str(word) for word in argv]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("measured on ")]
    return line, json.loads(figures.read_text())


def test_held_out_texts_are_known_wherever_they_lie(home, place, capsys):
    """From the moved run and from its export, in moved and grown data: never the training texts, unless asked to."""
    data = place / "texts" / "renamed.txt"
    line, figures = measured(capsys, home / "run", home / "corpus.txt")
    held_out = figures["texts"]
    assert (
        0 < held_out < 60 and line == f"measured on the held-out texts: {held_out} of 400; none of them was in training"
    )
    moved = place / "other" / "moved"
    shutil.move(place / "run", moved)
    assert measured(capsys, moved, data)[1] == figures
    assert main(["export", "--checkpoint", str(moved), "--output", str(place / "exported")]) == 0
    assert measured(capsys, place / "exported", data)[1] == figures
    with open(data, "a") as file:
        file.write("one more text about a boat\n")
    assert measured(capsys, moved, data)[1]["texts"] in (held_out, held_out + 1)
    part = place / "part.txt"
    part.write_text("".join(data.read_text().splitlines(keepends=True)[:100]))
    assert measured(capsys, moved, part)[1]["split"] == "eval"
    new = place / "new.txt"
    new.write_text("a boat on the river\na horse in the garden\n")
    assert measured(capsys, moved, new)[0] == "measured on all texts: 2 of 2; none of them was in training"


def forget_the_texts(run: Path) -> None:
    """As in a run of an earlier version."""
    for known in run.rglob("data.json"):
        known.unlink()
    for checkpoint in (run / "checkpoints").glob("step_*"):
        seal_again(checkpoint)


def test_training_texts_are_said_aloud(home, place, capsys):
    data = place / "texts" / "renamed.txt"
    line, figures = measured(capsys, place / "run", data, "--split", "train")
    assert figures["texts_in_training"] == figures["texts"] > 340
    assert f"{figures['texts']} of 400; {figures['texts']} of them WERE IN TRAINING" in line
    line, figures = measured(capsys, place / "run", data, "--split", "all")
    assert 340 < figures["texts_in_training"] < 400 == figures["texts"]
    forget_the_texts(place / "run")  # a run of an earlier version: its paths are all that it says
    line, figures = measured(capsys, place / "run", data)
    assert figures["split"] == "all" and "whether they were in training is not known" in line


@pytest.mark.slow
def test_a_tuned_model_knows_the_texts_of_the_weights_that_it_began_with(home, place, capsys):
    new = place / "new.txt"
    new.write_text("".join(f"a boat on the river {i}\n" for i in range(40)))
    flags = small_flags(new, place / "tuned", "--init_from", place / "run", "--max_steps", 1)
    train_in_ranks(1, flags)
    _, figures = measured(capsys, place / "tuned", place / "texts" / "renamed.txt", "--split", "train")
    assert figures["texts_in_training"] == figures["texts"] > 340
    forget_the_texts(place / "run")
    train_in_ranks(1, [*flags, "--output_dir", str(place / "again")])
    assert measured(capsys, place / "again", new, "--split", "train")[1]["texts_in_training"] > 30
    line, figures = measured(capsys, place / "again", place / "texts" / "renamed.txt")
    assert figures["texts_in_training"] is None and "is not known" in line


@pytest.mark.slow
def test_validation_texts_that_are_trained_on_are_counted(home, tmp_path):
    overlap = tmp_path / "validation.txt"
    overlap.write_text("".join((home / "corpus.txt").read_text().splitlines(keepends=True)[:7]) + "a boat\na horse\n")
    flags = small_flags(home / "corpus.txt", tmp_path / "run", "--eval_data_path", overlap, "--max_steps", 1)
    assert "note: 7 of 9 validation texts are also trained on" in train_in_ranks(1, flags)


def _different_folders(dist, flags: list[str], folders: list[str]) -> str:
    """A run whose ranks stand in different folders -> how it is refused."""
    os.chdir(folders[dist.rank])
    config = train_config(flags)
    with pytest.raises(UserError) as caught:
        train(config, engine_json.read(config.deepspeed_config), dist)
    return str(caught.value)


@pytest.mark.slow
def test_all_ranks_read_the_same_texts(home, tmp_path):
    """A host whose copy of the data is another: nobody would notice, but for the figures."""
    folders = [str(home), str(tmp_path)]
    (tmp_path / "corpus.txt").write_text("a boat on the river\na horse in the garden\n" * 200)
    flags = small_flags("corpus.txt", tmp_path / "run", "--tokenizer_path", home / "run" / "tokenizer")
    for message in run_ranks(2, _different_folders, [*flags, "--palette", "id"], folders):
        assert "rank(s) 1 read other texts there than rank 0" in message
    assert not (tmp_path / "run").exists()


OTHER = {
    "eval_fraction": ["0.2"],
    "text_key": ["body"],
    "document": ["file"],
    "skip_bad_records": [],
    "vocab_size": ["400"],
    "use_chat_template": [],
    "enable_condition": [],
    "max_tokens": ["32"],
    "img_size": ["32"],
    "seed": ["2"],
    "recipe": ["reference"],
}


@pytest.mark.parametrize("name", OTHER)
def test_what_decides_samples_order_or_split_cannot_change(name, place, capsys):
    assert FIELDS[name].metadata["resume"] == FIXED
    message = refused(capsys, ["train", *resumed(place, f"--{name}", *OTHER[name])])
    assert "a resumed run goes on as it began" in message and f"--{name} is" in message


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--no_packing"], "--packing is False, the run has True"),
        (["--train_batch_size", "4"], "train_batch_size"),
        (["--eval_data_path", "../texts/validation.txt"], "the validation texts, or their order, are others"),
    ],
)
def test_nor_can_packing_train_batch_or_the_validation_texts(flags, problem, place, capsys):
    (place / "texts" / "validation.txt").write_text("a boat on the river\na horse in the garden\n")
    before = metrics(place / "run")
    assert problem in refused(capsys, ["train", *resumed(place, *flags)])
    assert metrics(place / "run") == before
