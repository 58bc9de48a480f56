"""Reading files by their format number, and what becomes of old ones."""

import json

import pytest

from ds_tokimg.errors import UserError, has_type, value_problems
from ds_tokimg.settings import formats
from ds_tokimg.settings.config import TrainConfig


def refused(action, *arguments) -> str:
    """The one sentence of a file that must be refused."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def config(tmp_path):
    """(path, values) of a config.json that can be loaded."""
    path = tmp_path / "config.json"
    TrainConfig(data_path="x").save(path)
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"{", "not valid JSON at line 1, column 2"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "expected a JSON object {...}, found list"),
        (b'{"data_path": "\xff"}', "not UTF-8 text (byte 15)"),
        (b'{"format": 3}', "written by a newer ds_tokimg: format 3, this one reads up to 2"),
        (b'{"format": "one"}', "format is 'one': expected a whole number up to 2"),
        (b'{"format": -1}', "format is -1: expected a whole number up to 2"),
        (b'{"format": true}', "format is True: expected a whole number up to 2"),
    ],
)
def test_what_is_no_file_of_ours_is_one_sentence(content, expected, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    message = refused(TrainConfig.load, path)
    assert message.startswith(f"{path}: ") and expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values | {"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'?"),
        (lambda values: {k: v for k, v in values.items() if k != "lr"}, "the key 'lr' is missing"),
        (lambda values: values | {"seed": "abc"}, "seed is 'abc': expected a whole number"),
        (lambda values: values | {"log_interval": 0}, "--log_interval 0: expected a whole number of at least 1"),
    ],
)
def test_settings_must_be_those_of_this_version(change, expected, config):
    path, values = config
    path.write_text(json.dumps(change(values)))
    assert refused(TrainConfig.load, path) == f"{path}: {expected}"


def test_a_file_says_its_format(config):
    path, values = config
    assert values["format"] == formats.FORMAT
    assert TrainConfig.load(path) == TrainConfig(data_path="x")


def test_a_file_without_a_number_is_of_format_0(config):
    path, values = config
    del values["format"]
    path.write_text(json.dumps(values))
    assert TrainConfig.load(path) == TrainConfig(data_path="x")


@pytest.mark.parametrize("number", [{}, {"format": 1}], ids=["format 0", "format 1"])
def test_a_run_of_an_earlier_version_validates_and_steps_as_it_did(number, config):
    path, values = config
    later = ("format", "eval_tokens", "skip_spikes", "go_back_after", "verbose", "accept_other_texts")
    then = {key: value for key, value in values.items() if key not in later}
    path.write_text(json.dumps(then | number))
    assert TrainConfig.load(path) == TrainConfig(data_path=["x"], eval_tokens=0)


def test_files_that_were_not_written_together_are_refused(tmp_path):
    paths = {formats.MODEL: tmp_path / "model.json", formats.TEXT: tmp_path / "text.json"}
    paths[formats.MODEL].write_text('{"format": 2}')
    paths[formats.TEXT].write_text("{}")
    assert "they were not written together" in refused(formats.read_together, paths)


@pytest.fixture
def old_folder(tmp_path, monkeypatch):
    """A writer of format-0 files, and their reader, in a version that added one key."""
    monkeypatch.setattr(formats, "ADDED_IN_1", {"text.json": {"letters": 26}})
    monkeypatch.setattr(formats, "ADDED_IN_2", {})

    def read(kind, values):
        (tmp_path / kind).write_text(json.dumps(values))
        return formats.read(tmp_path / kind, kind)

    return read


def test_settings_that_were_left_alone_are_dropped(old_folder):
    assert old_folder("config.json", {"positions": "reading", "self_conditioning": 0, "seed": 1}) == {"seed": 1}
    assert old_folder("config.json", {"seed": 1}) == {"seed": 1}
    model = {"patch_size": 4, "head": "posterior", "posterior": "auto", "in_turn": True}
    codec = {"vocab_size": 300, "token_size": 2}
    old = {"positions": "reading", "self_conditioning": False, "neighbours": 2}
    written = {"block_size": 0, "in_turn": True, "exact_patches": 4}
    upgraded = old_folder("model.json", {"model": model | old, "codec": codec})
    assert upgraded == {"model": model | {"local_window": 2}, "codec": codec, "writing": written}


@pytest.mark.parametrize(
    ("head", "posterior", "vocab_size", "token_size", "exact_patches"),
    [
        ("posterior", "auto", 4096, 2, 0),
        ("posterior", "auto", 4097, 2, 0),
        ("posterior", "auto", 4096, 4, 1),
        ("posterior", "auto", 49_152, 4, 1),  # a tree
        ("posterior", "digits", 300, 4, 0),
        ("linear", "auto", 300, 4, 0),
    ],
)
def test_a_models_way_of_writing_moves_from_its_texts_to_itself(
    tmp_path, head, posterior, vocab_size, token_size, exact_patches
):
    model = {"patch_size": 4, "head": head, "posterior": posterior, "in_turn": False}
    codec = {"vocab_size": vocab_size, "token_size": token_size}
    (tmp_path / "model.json").write_text(json.dumps({"model": model, "codec": codec}))
    (tmp_path / "text.json").write_text(json.dumps({"block_size": 3}))
    files = formats.read_together(formats.files_of(tmp_path, "model.json", "text.json")).files
    assert "block_size" not in files["text.json"]
    assert files["model.json"]["writing"] == {"block_size": 3, "in_turn": False, "exact_patches": exact_patches}


@pytest.mark.parametrize("content", [{"model": "no object"}, {"codec": {}}, {"model": {"depth": 1}, "codec": {}}])
def test_a_model_that_is_none_is_refused(old_folder, content):
    assert "describes no model" in refused(old_folder, "model.json", content)


def test_settings_that_this_version_no_longer_has_are_refused(old_folder, tmp_path):
    message = refused(old_folder, "config.json", {"positions": "grid"})
    assert message.startswith(f"{tmp_path / 'config.json'}: positions is 'grid', which this version no longer has")
    assert "self_conditioning is True" in refused(old_folder, "model.json", {"model": {"self_conditioning": True}})


def test_settings_that_there_were_not_yet_are_added(old_folder):
    assert old_folder("text.json", {}) == {"letters": 26}
    assert old_folder("text.json", {"letters": 33}) == {"letters": 33}


def test_a_list_of_decays_becomes_one(old_folder):
    assert old_folder("config.json", {"ema_decay": [0.99]}) == {"ema_decay": 0.99}
    assert old_folder("config.json", {"ema_decay": []}) == {"ema_decay": 0.0}
    assert "ema_decay is [0.9, 0.99]" in refused(old_folder, "config.json", {"ema_decay": [0.9, 0.99]})
    state = old_folder("trainer_state.json", {"engine": {"ema_decay": [0.9, 0.99]}})
    assert state == {"engine": {"ema_decay": 0.9}, "schedule": None}


def test_parts_of_parameters_names_change_together(monkeypatch):
    renamed = {"blocks": "layers", "before_embed": "token_shift", "a.b": "b", "b": "a"}
    monkeypatch.setattr(formats, "RENAMED_PARAMETERS", {1: renamed})
    names = ["model.blocks.0.norm.weight", "blocks.0", "before_embed.weight", "my_blocks.blocksize", "a.b.b.a"]
    expected = ["model.layers.0.norm.weight", "layers.0", "token_shift.weight", "my_blocks.blocksize", "b.a.a"]
    assert list(formats.parameter_names(names, 0).values()) == expected
    assert list(formats.parameter_names(names, 1).values()) == names


def test_problems_of_values():
    fields = {"depth": int, "rate": float, "name": str | None, "ids": list[int] | None}
    assert value_problems({"depth": 1, "rate": 1, "name": None, "ids": [1]}, fields) == []
    problems = value_problems({"dept": 1, "rate": "x" * 99, "name": None, "ids": [1.5]}, fields, "model.")
    assert problems == [
        "unknown key 'model.dept'; did you mean 'depth'?",
        "the key 'model.depth' is missing",
        f"model.rate is '{'x' * 56}...: expected a number",
        "model.ids is [1.5]: expected a list of numbers or null",
    ]


def test_truth_is_no_number():
    assert has_type(1, float) and not has_type(True, int) and not has_type(True, float) and has_type(True, bool)
