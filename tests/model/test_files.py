"""A model on the disk: what is broken in its files is one sentence that names the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_tokimg.errors import UserError
from ds_tokimg.model.jit import JiT
from ds_tokimg.settings import formats
from ds_tokimg.tokens.codec import TokenCodec
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny_model(TokenCodec(12, palette=torch.arange(11, -1, -1))).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "export")


def refused(folder) -> str:
    with pytest.raises(UserError) as caught:
        JiT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(folder, part: str | None, **values) -> None:
    """Other values in model.json; `...` removes a key."""
    path = folder / "model.json"
    content = json.loads(path.read_text())
    place = content if part is None else content[part]
    place.update(values)
    for key in [key for key, value in place.items() if value is ...]:
        del place[key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("part", "values", "expected"),
    [
        (None, {"format": 3}, "written by a newer ds_tokimg: format 3, this one reads up to 2"),
        (None, {"codex": {}}, "unknown key 'codex'; did you mean 'codec'?"),
        (None, {"codec": ...}, "the key 'codec' is missing"),
        (None, {"model": [1]}, "model is [1]: expected an object"),
        ("model", {"widht": 3}, "unknown key 'model.widht'; did you mean 'width'?"),
        ("model", {"heads": ...}, "the key 'model.heads' is missing"),
        ("model", {"width": "abc"}, "model.width is 'abc': expected a whole number"),
        ("model", {"depth": 0}, "depth is 0: expected at least 1"),
        ("model", {"heads": 3}, "width 32 is not a multiple of twice the 3 heads"),
        ("model", {"noisy_depth": 3}, "noisy_depth is 3; the model has 2 blocks"),
        ("model", {"local_window": -1}, "local_window is -1: expected 0 or more"),
        ("model", {"head": "cubic"}, "unknown head 'cubic'; available: posterior, linear"),
        ("model", {"patch_size": 0}, "must be at least 1"),
        ("model", {"layout": "spiral"}, "unknown layout 'spiral'"),
        ("codec", {"radx": 2}, "unknown key 'codec.radx'; did you mean 'radix'?"),
        ("codec", {"vocab_size": ...}, "the key 'codec.vocab_size' is missing"),
        ("codec", {"radix": None}, "codec.radix is None: expected a whole number"),
        ("codec", {"radix": 2}, "radix 2 writes only 8 tokens"),
        ("codec", {"palette": [0] * 12}, "palette must be a permutation of range(12)"),
        ("codec", {"palette": [10**30] * 12}, "palette must be a permutation of range(12)"),
        ("codec", {"palette": "id"}, "codec.palette is 'id': expected a list of numbers or null"),
    ],
)
def test_bad_values(part, values, expected, folder):
    changed(folder, part, **values)
    message = refused(folder)
    assert message.startswith(f"{folder / 'model.json'}: ") and expected in message


def test_weights_of_another_model(folder):
    changed(folder, "model", width=36)
    assert "these are the weights of another model than model.json says" in refused(folder)


def test_weights_that_are_torn(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert refused(folder).startswith(f"{path}: these are no whole weights")


def test_a_folder_without_weights_is_no_export(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is no export of a model"):
        JiT.from_pretrained(folder)


def test_weights_of_an_earlier_format_get_todays_names(folder, exported, monkeypatch):
    monkeypatch.setattr(formats, "RENAMED_PARAMETERS", {1: {"stem": "patch_embed", "rank": "blocks"}})
    weights = load_file(folder / "model.safetensors")
    old = {name.replace("patch_embed", "stem").replace("blocks", "rank"): value for name, value in weights.items()}
    assert old.keys() != weights.keys()
    save_file(old, folder / "model.safetensors")
    assert "has shape" in refused(folder)  # only format 0 has others
    changed(folder, None, format=...)
    loaded = JiT.from_pretrained(folder).state_dict()
    assert all(value.equal(loaded[name]) for name, value in weights.items())
