"""metrics.jsonl and TensorBoard, read back with TensorBoard's own reader."""

import json
import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_tokimg.training.tracking import Tracker
from tests.support.distributed import run_ranks, tiny_engine, train


def _run(dist, folder, first_step, steps):
    """Log `steps` rows after `first_step`; the third step's loss is not finite."""
    blocks = {"tensorboard": {"enabled": True, "output_path": str(folder), "job_name": "tensorboard"}}
    engine = tiny_engine(dist, 0, **blocks)
    tracker = Tracker(folder, engine, first_step)
    train(engine, 1)
    for step in range(first_step + 1, first_step + steps + 1):
        row = {"step": step, "loss": math.nan if step == 3 else 1.0 / step, "epoch": 0}
        tracker.log(row)
        if step % 2 == 0:
            tracker.complete(step, {"val_token_accuracy": {"0.1": 0.9, "0.5": step / 10}})
    tracker.images("samples/page", torch.rand(2, 3, 8, 8), first_step + steps)
    tracker.text("samples/text", "once upon a time", first_step + steps)
    tracker.close()
    return tracker.active


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _events(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_rank_0_writes_rows_scalars_images_and_text(tmp_path):
    assert run_ranks(2, _run, tmp_path, 0, 4) == [True, False]
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == {"step": 1, "loss": 1.0, "epoch": 0}
    assert rows[2]["loss"] is None  # JSON has no NaN
    assert rows[3]["val_token_accuracy"] == {"0.1": 0.9, "0.5": 0.4}
    events = _events(tmp_path)
    tags = events.Tags()
    expected = {f"validation/val_token_accuracy/{level}" for level in ("0.1", "0.5")}
    assert set(tags["scalars"]) == {"train/loss", "train/epoch", *expected}  # nothing of DeepSpeed's own
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert (losses[1], losses[4]) == (1.0, 0.25) and math.isnan(losses[3])
    assert tags["images"] == ["samples/page/0", "samples/page/1"] or tags["images"] == ["samples/page"]
    (text,) = events.Tensors("samples/text/text_summary")
    assert text.tensor_proto.string_val[0] == b"once upon a time"


def test_a_resumed_run_continues_the_rows(tmp_path):
    run_ranks(1, _run, tmp_path, 0, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    run_ranks(1, _run, tmp_path, 3, 1)
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3, 4]
    assert sorted(event.step for event in _events(tmp_path).Scalars("train/loss")) == [1, 2, 3, 4]
    run_ranks(1, _run, tmp_path, 0, 1)  # a new run in the same folder
    assert [row["step"] for row in _rows(tmp_path)] == [1]


def test_without_tensorboard_rows_are_still_written(tmp_path):
    assert run_ranks(1, _run_without_tensorboard, tmp_path) == [[{"step": 1, "loss": 0.5}]]


def _run_without_tensorboard(dist, folder):
    tracker = Tracker(folder, tiny_engine(dist, 1))
    tracker.log({"step": 1, "loss": 0.5})
    tracker.images("page", torch.rand(1, 3, 8, 8), 1)
    tracker.text("text", "nothing", 1)
    tracker.close()
    return _rows(folder)
