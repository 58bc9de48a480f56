"""What a launch does otherwise than the run that it goes on with."""

import json
from dataclasses import replace

from ds_tokimg.settings.changes import changes
from ds_tokimg.settings.config import TrainConfig

CONFIG = TrainConfig(data_path=["x.txt"], lr=1e-3, epochs=3, train_batch_size=8)
JSON = {"bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}}}


def checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    CONFIG.save(folder / "config.json")
    (folder / "ds_config_given.json").write_text(json.dumps(JSON))
    return folder


def test_nothing_is_said_where_nothing_changes(tmp_path):
    launch = replace(CONFIG, data_path=["/elsewhere/x.txt"], max_steps=4, resume="latest", verbose=True)
    assert changes(launch, JSON, checkpoint(tmp_path)) == []


def test_each_setting_and_entry_is_said(tmp_path):
    raw = {"bf16": {"enabled": False}, "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}
    raw["zero_optimization"] = {"stage": 2}
    assert changes(replace(CONFIG, lr=2e-3), raw, checkpoint(tmp_path)) == [
        "from here on --lr is 0.002; it was 0.001",
        'from here on bf16.enabled of the engine\'s JSON is false; it was "auto"',
        "from here on the engine's JSON has zero_optimization.stage 2",
        "from here on the engine's JSON leaves out optimizer.params.lr",
    ]


def test_files_of_an_earlier_version_lie_in_the_run(tmp_path):
    folder = checkpoint(tmp_path)
    for name in ("config.json", "ds_config_given.json"):
        (folder / name).rename(tmp_path / "run" / name)
    assert changes(replace(CONFIG, epochs=4), JSON, folder) == ["from here on --epochs is 4; it was 3"]
