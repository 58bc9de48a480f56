"""What a real run shows: in TensorBoard (its reader, its server, a browser), in CSV files, and in its folder."""

import csv
import html
import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from benchmarks import proof
from tests.support import browser
from tests.support.runs import metrics, small_flags, train_in_ranks, write_corpus

pytestmark = pytest.mark.usefixtures("cache")

SHIPPED = json.loads((Path(__file__).parents[2] / "ds_config.json").read_text())
VALIDATED = (4, 8)


def flags(folder: Path, run: str, *more) -> list[str]:
    """Of a run on two ranks at stage 3, whose weights no rank has whole; `folder` holds its corpus and JSON."""
    path = folder / "stage3.json"
    path.write_text(json.dumps(SHIPPED | {"zero_optimization": {"stage": 3}, "csv_monitor": {"enabled": True}}))
    short = ("--max_steps", 8, "--max_tokens", 32, "--deepspeed_config", path)
    return small_flags(folder / "corpus.txt", folder / "runs" / run, *short, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """runs/first: a finished run with samples."""
    folder = tmp_path_factory.mktemp("dashboard")
    write_corpus(folder)
    train_in_ranks(2, flags(folder, "first", "--num_samples", 2))
    return folder


@pytest.fixture(scope="module")
def events(folder):
    sizes = {"images": 0, "tensors": 0}
    return EventAccumulator(str(folder / "runs" / "first" / "tensorboard"), size_guidance=sizes).Reload()


def texts_of(events, tag: str) -> dict[int, str]:
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


def test_curves(events):
    tags = set(events.Tags()["scalars"])
    assert {tag.split("/")[0] for tag in tags} == {"train", "val", "perf", "data"}
    assert {"train/loss", "train/lr", "train/grad_norm", "train/bits_per_token_many_steps"} <= tags
    assert {"val/bits_per_token", "val/bits_per_byte", "val/unigram_entropy", "val/loss_on_path"} <= tags
    assert {"perf/peak_memory_bytes", "perf/peak_share", "data/tokens_seen"} <= tags
    by_noise = {tag.rsplit("/", 1)[0] for tag in tags if tag.count("/") == 2}
    assert by_noise == {"val/loss_by_noise", "val/bits_by_noise", "val/token_accuracy"}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/unigram_entropy")] == list(VALIDATED)


def test_bits_of_the_noise_levels_add_up_and_tokens_are_counted(folder):
    rows = metrics(folder / "runs" / "first")
    for step in VALIDATED:
        row = rows[step - 1]
        assert sum(row["val_bits_by_noise"].values()) == pytest.approx(row["val_bits_per_token"], rel=1e-9)
    counts = [row["valid_tokens"] for row in rows]
    assert [row["tokens_seen"] for row in rows] == [sum(counts[: n + 1]) for n in range(8)]
    assert all(1e7 < row["peak_memory_bytes"] < 1e11 for row in rows)


def test_pictures_and_texts_of_every_validation(folder, events):
    run = folder / "runs" / "first"
    assert events.Tags()["images"] == ["samples/denoising", "samples/from_noise"]
    for name in ("denoising", "from_noise"):
        shown = {image.step: (image.width, image.height) for image in events.Images(f"samples/{name}")}
        files = {step: Image.open(run / "samples" / f"step_{step:08d}" / f"{name}.png").size for step in VALIDATED}
        assert shown == files and all(width > 900 and height > 300 for width, height in files.values())
    texts = texts_of(events, "samples/texts")
    assert list(texts) == list(VALIDATED)
    for step, text in texts.items():
        written = (run / "samples" / f"step_{step:08d}" / "texts.txt").read_text()
        assert "[0] noise alone" in written and "[1] '" in written
        assert len(text.splitlines()) == 4
    assert list(texts_of(events, "samples/at_the_end")) == [8]


def test_settings_plan_hparams_and_layout(events):
    settings, plan = (texts_of(events, f"run/{name}")[0] for name in ("settings", "plan"))
    assert "| `vocab_size` | `300` |" in settings and '"stage": 3' in settings
    assert "GB of a rank: optimizer" in plan and "| ZeRO stage | 3 |" in plan and "parameters" in plan
    metadata = events.summary_metadata
    start, end = (
        HParamsPluginData.FromString(metadata[f"_hparams_/{name}"].plugin_data.content)
        for name in ("session_start_info", "session_end_info")
    )
    hparams = start.session_start_info.hparams
    assert hparams["model"].string_value == "JiT-XS/4" and hparams["zero_stage"].number_value == 3
    assert hparams["lr"].number_value == 1e-3 and "output_dir" not in hparams
    assert end.session_end_info.status == 1  # success
    experiment = HParamsPluginData.FromString(metadata["_hparams_/experiment"].plugin_data.content).experiment
    compared = [metric.name.tag for metric in experiment.metric_infos]
    assert compared[0] == "val/bits_per_token" and set(compared) <= set(events.Tags()["scalars"])
    (config,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(config.tensor_proto.string_val[0])
    assert list(layout.category[0].chart[0].multiline.tag)[:2] == ["^val/bits_per_token$", "^val/unigram_entropy$"]


def test_csv_files_lie_in_the_run(folder):
    with open(folder / "runs" / "first" / "csv" / "val_bits_per_token.csv") as file:
        head, *rows = csv.reader(file)
    expected = [
        (row["step"], row["val_bits_per_token"]) for row in metrics(folder / "runs" / "first") if "val_loss" in row
    ]
    assert head == ["step", "bits_per_token"]
    assert [(int(step), float(value)) for step, value in rows] == expected


def test_showing_changes_no_result(folder, capsys):
    train_in_ranks(2, flags(folder, "silent", "--num_samples", 0))
    assert proof.main([str(folder / "runs" / name) for name in ("first", "silent")]) == 0, capsys.readouterr().out
    assert not (folder / "runs" / "silent" / "samples").exists()


# ---- a server ----


@pytest.fixture(scope="module")
def server(folder):
    """The address of TensorBoard on the runs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        found = next((found for line in process.stderr if (found := re.search(r"http://localhost:\d+/", line))), None)
        assert found, "TensorBoard ended without serving"
        yield found[0]
    finally:
        process.kill()
        process.wait()


def ask(server: str, path: str, **question):
    """GET, or POST of JSON; the run that is asked about is the first."""
    data = json.dumps(question["json"]).encode() if question else None
    request = urllib.request.Request(f"{server}data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def test_the_server_has_all_of_it(server):
    run = "first/tensorboard"
    assert run in ask(server, "runs")
    assert "val/bits_per_token" in ask(server, "plugin/scalars/tags")[run]
    assert {"samples/denoising", "samples/from_noise"} <= set(ask(server, "plugin/images/tags")[run])
    texts = {f"{name}/text_summary" for name in ("samples/texts", "run/settings", "run/plan")}
    assert texts <= set(ask(server, "plugin/text/tags")[run])
    shown = ask(server, f"plugin/text/text?run={run}&tag=samples/texts/text_summary")
    assert [text["step"] for text in shown] == list(VALIDATED) and "<table>" in shown[0]["text"]
    assert "noise alone" in html.unescape(shown[0]["text"])
    assert ask(server, "plugin/custom_scalars/layout")["category"][0]["title"] == "What matters"
    experiment = ask(server, "plugin/hparams/experiment", json={"experimentName": ""})
    assert {"model", "lr", "zero_stage"} <= {info["name"] for info in experiment["hparamInfos"]}


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_all_of_it(server, tmp_path):
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with browser.chromium(tmp_path / "profile") as port:

        def look(tab: str, *words: str, pictures: int = 0) -> dict:
            return browser.look(port, f"{server}#{tab}", list(words), shots / f"{tab}.png", pictures)

        look("timeseries", "first/tensorboard", "data\n/tokens_seen")  # the first group
        look("custom_scalars", "What matters", "bits per token, beside the unigram entropy")
        shown = look("images", "samples/denoising", "samples/from_noise", pictures=2)
        assert all(width > 900 for width, _ in shown["pictures"][:2])
        look("text", "samples/texts", "noise alone", "run/plan", "GB of a rank: optimizer")
        look("hparams", "zero_stage", "val/bits_per_token")


# ---- other monitors ----


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)")
def test_weights_and_biases_offline(tmp_path):
    """In a process of its own, as W&B takes its settings from the environment."""
    edited = tmp_path / "wandb.json"
    edited.write_text(json.dumps(SHIPPED | {"wandb": {"enabled": True, "project": "pixels"}}))
    flags = small_flags(write_corpus(tmp_path), tmp_path / "run", "--deepspeed_config", edited, "--num_samples", 1)
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "ds_tokimg", "train", *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    (log,) = tmp_path.rglob("*.wandb")
    assert b"val/bits_per_token" in log.read_bytes()
    assert list(tmp_path.rglob("media/images/samples/denoising*.png"))
