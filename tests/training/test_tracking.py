"""metrics.jsonl, samples and TensorBoard, read back with TensorBoard's own reader."""

import json
import math

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_tokimg.training.tracking import Meter, Tracker
from tests.support.distributed import run_ranks, tiny_engine, train

PICTURE = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(4, 8, 3))


def _run(dist, folder, first_step, steps):
    """Log `steps` rows after `first_step`; the third step's loss is not finite."""
    blocks = {"tensorboard": {"enabled": True, "output_path": str(folder), "job_name": "tensorboard"}}
    engine = tiny_engine(dist, 0, **blocks)
    tracker = Tracker(folder, engine, first_step, {"val_loss": "val/other"})
    train(engine, 1)
    for step in range(first_step + 1, first_step + steps + 1):
        row = {"step": step, "loss": math.nan if step == 3 else 1.0 / step, "epoch": 0}
        tracker.log(row)
        if step % 2 == 0:
            tracker.complete(step, {"val_loss": 2.0, "val_token_accuracy": {"0.1": 0.9, "0.5": step / 10}})
    tracker.picture("page", PICTURE, first_step + steps)
    tracker.text("words", "once\nupon", first_step + steps, "once<br>upon")
    tracker.describe({"run/settings": "none"}, [])
    tracker.close()
    return tracker.active


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _events(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_rank_0_writes_rows_scalars_pictures_and_texts(tmp_path):
    assert run_ranks(2, _run, tmp_path, 0, 4) == [True, False]
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == {"step": 1, "loss": 1.0, "epoch": 0}
    assert rows[2]["loss"] is None  # JSON has no NaN
    assert rows[3]["val_token_accuracy"] == {"0.1": 0.9, "0.5": 0.4}
    events = _events(tmp_path)
    tags = events.Tags()
    expected = {f"val/token_accuracy/{level}" for level in ("0.1", "0.5")} | {"val/other"}
    assert set(tags["scalars"]) == {"train/loss", "data/epoch", *expected}  # nothing of DeepSpeed's own
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert (losses[1], losses[4]) == (1.0, 0.25) and math.isnan(losses[3])
    (image,) = events.Images("samples/page")
    assert (image.step, image.width, image.height) == (4, 8, 4)
    (text,) = events.Tensors("samples/words/text_summary")
    assert text.tensor_proto.string_val[0] == b"once<br>upon"
    assert events.Tensors("run/settings/text_summary")[0].tensor_proto.string_val[0] == b"none"
    samples = tmp_path / "samples" / "step_00000004"
    assert np.array_equal(np.asarray(Image.open(samples / "page.png")), np.asarray(PICTURE))
    assert (samples / "words.txt").read_text() == "once\nupon"


def test_a_resumed_run_continues_the_rows(tmp_path):
    run_ranks(1, _run, tmp_path, 0, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    run_ranks(1, _run, tmp_path, 3, 1)
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3, 4]
    events = _events(tmp_path)
    assert sorted(event.step for event in events.Scalars("train/loss")) == [1, 2, 3, 4]
    assert [event.step for event in events.Images("samples/page")] == [4]  # that of step 5 is forgotten too
    run_ranks(1, _run, tmp_path, 0, 1)  # a new run in the same folder
    assert [row["step"] for row in _rows(tmp_path)] == [1]


def test_without_tensorboard_rows_and_samples_are_still_written(tmp_path):
    assert run_ranks(1, _run_without_tensorboard, tmp_path) == [[{"step": 1, "loss": 0.5}]]
    assert {path.name for path in (tmp_path / "samples" / "step_00000001").iterdir()} == {"page.png", "words.txt"}


def _run_without_tensorboard(dist, folder):
    tracker = Tracker(folder, tiny_engine(dist, 1))
    tracker.log({"step": 1, "loss": 0.5})
    tracker.picture("page", PICTURE, 1)
    tracker.text("words", "nothing", 1, "nothing")
    tracker.describe({"run/settings": "none"}, [])
    tracker.close()
    return _rows(folder)


class _Step:
    def __init__(self, tokens):
        self.sums = {"valid_tokens": float(tokens)}


def test_tokens_are_counted_over_all_steps_and_launches():
    meter = Meter({}, 0)
    for tokens in (10, 20):
        meter.add(_Step(tokens))
    assert (meter.tokens_seen(), meter.tokens_seen()) == (30, 30)
    resumed = Meter({"step": 2, "tokens_seen": 30, "valid_tokens": 20}, 2)
    resumed.add(_Step(5))
    assert resumed.tokens_seen() == 35
    assert Meter({"step": 2, "tokens_seen": 30, "valid_tokens": 20}, 3).tokens_seen() == 50  # a step between rows
    assert Meter({"step": 4, "valid_tokens": 20}, 4).tokens_seen() == 80  # a run from before this was counted
