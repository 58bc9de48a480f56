"""The settings themselves: types, ranges, contradictions, and what is written down."""

import dataclasses
import json

import pytest

from ds_tokimg.errors import UserError
from ds_tokimg.settings.config import SECTIONS, DataSettings, TrainConfig
from ds_tokimg.settings.setting import FIXED, LAUNCH, MAY_CHANGE, SAME_TEXTS


def test_every_setting_has_a_section_a_help_and_a_rule_for_resuming():
    fields = [field for settings in SECTIONS.values() for field in dataclasses.fields(settings)]
    assert [field.name for field in fields] == [field.name for field in dataclasses.fields(TrainConfig)]
    for field in fields:
        assert len(field.metadata["help"]) > 10
        assert field.metadata["resume"] in (FIXED, SAME_TEXTS, MAY_CHANGE, LAUNCH)


def test_numbers_have_a_range():
    for field in dataclasses.fields(TrainConfig):
        is_number = field.type in (int, float, int | None, float | None)
        assert is_number == (field.metadata["range"] is not None), field.name


def test_a_group_of_settings_is_taken_as_one():
    config = TrainConfig(data_path="x", packing=False, seed=3)
    assert config.part(DataSettings) == DataSettings(data_path=["x"], packing=False)


def test_another_dataclass_takes_the_settings_that_it_names():
    @dataclasses.dataclass
    class Other:
        seed: int
        width: int
        packing: bool
        depth: int = 2

    assert TrainConfig(data_path="x", seed=3).part(Other, width=5, packing=None) == Other(3, 5, None, 2)


def test_capacity_and_patch():
    config = TrainConfig(data_path="x", model="JiT-B/8", img_size=64, token_size=2)
    assert (config.patch_size, config.capacity) == (8, 1024)


def test_save_and_load(tmp_path):
    config = TrainConfig(data_path="x", lr=1e-4, ema_decay=0.9, max_tokens=7, recipe="at-once")
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_load_names_all_that_is_wrong(tmp_path):
    path = tmp_path / "config.json"
    values = dataclasses.asdict(TrainConfig(data_path="x")) | {"epoch": 3, "packing": 1, "seed": True}
    path.write_text(json.dumps(values | {"ema_decay": None}))
    with pytest.raises(UserError) as caught:
        TrainConfig.load(path)
    message = str(caught.value)
    assert "unknown key 'epoch'; did you mean 'epochs'?" in message
    assert "packing is 1: expected true or false" in message
    assert "seed is True: expected a whole number" in message
    assert "ema_decay is None: expected a number" in message


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_load_of_a_broken_file(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        TrainConfig.load(path)
