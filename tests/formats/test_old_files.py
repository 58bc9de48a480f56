"""Files that earlier versions wrote: loaded, measured, written with and gone on from. README.md says what they are."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from ds_tokimg.__main__ import main
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.inference.loading import load_trained
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings import formats
from ds_tokimg.settings.command_line import train_config
from tests.support.distributed import run_ranks
from tests.support.runs import metrics, write_corpus

HERE = Path(__file__).parent
TRAINED = ("at_once", "at_once_export", "left_to_right_export")
TEXT_KEYS = ("prompt", "text", "token_ids", "num_tokens")  # of a text, since format 0


@pytest.fixture(scope="module", params=range(formats.FORMAT), ids=lambda number: f"format {number}")
def number(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def untouched(number, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(f"format_{number}")
    with tarfile.open(HERE / f"format_{number}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def expected(untouched) -> dict:
    return json.loads((untouched / "expected.json").read_text(encoding="utf-8"))


def _files(folder: Path) -> list[Path]:
    kinds = (formats.CONFIG, formats.MODEL, formats.TEXT, formats.TRAINER_STATE)
    return [path for path in folder.rglob("*.json") if path.name in kinds]


def test_the_files_are_of_that_format(number, untouched):
    assert len(_files(untouched)) == 8
    assert all(json.loads(path.read_text()).get("format", 0) == number for path in _files(untouched))


@pytest.mark.parametrize("name", TRAINED[1:])
def test_an_export_is_a_model(name, untouched):
    model = JiT.from_pretrained(untouched / name)
    loaded = load_trained(str(untouched / name)).model.state_dict()
    assert all(value.equal(loaded[key]) for key, value in model.state_dict().items())


def test_averages_of_a_checkpoint_are_those_of_its_export(untouched):
    weights = checkpoints.load_weights(checkpoints.find(untouched / "at_once"))
    exported = JiT.from_pretrained(untouched / "at_once_export").state_dict()
    assert weights.keys() == exported.keys()
    assert all(value.equal(exported[name]) for name, value in weights.items())


@pytest.mark.parametrize("name", TRAINED)
def test_figures_are_what_they_were(name, untouched, expected, tmp_path):
    command = ["evaluate", "--checkpoint", str(untouched / name), "--data_path", str(untouched / "corpus.txt")]
    assert main([*command, "--split", "eval", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    for key, value in expected[name]["figures"].items():
        assert figures[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("name", TRAINED)
def test_texts_are_what_they_were(name, untouched, expected, tmp_path):
    command = ["generate", "--checkpoint", str(untouched / name), "--num_samples", "2", "--seed", "3"]
    assert main([*command, "--json", str(tmp_path / "texts.json")]) == 0
    texts = json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))
    assert [{key: text[key] for key in TEXT_KEYS} for text in texts] == expected[name]["texts"]


def _resume(dist, folder):
    from ds_tokimg.model import config as shapes
    from ds_tokimg.settings import engine_json
    from ds_tokimg.training.run import train

    os.chdir(folder)
    shapes.SIZES["XS"] = (1, 16, 2)
    config = train_config("--resume latest --output_dir at_once --max_steps 6".split())
    train(config, engine_json.read(config.deepspeed_config), dist)


def test_a_run_goes_on_as_it_would_have(untouched, expected, tmp_path):
    folder = shutil.copytree(untouched, tmp_path / "work")
    run_ranks(1, _resume, folder)
    rows = metrics(folder / "at_once")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, then in zip(rows, expected["resumed"], strict=True):
        if "bits_per_token_many_steps" in row:  # its name where tokens are drawn in turn
            row["bits_per_token"] = row.pop("bits_per_token_many_steps")
        assert {key: row[key] for key in then} == pytest.approx(then, rel=1e-6)
    newest = checkpoints.find(folder / "at_once")
    assert newest.name == "step_00000006"
    for path in (folder / "at_once" / formats.CONFIG, *_files(newest)):
        assert json.loads(path.read_text())["format"] == formats.FORMAT
