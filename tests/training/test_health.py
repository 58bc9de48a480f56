"""Runs whose numbers go bad: NaN in data, weights and averages, spikes, a learning rate that is far too high."""

import json
import math
from pathlib import Path

import pytest
import torch

from ds_tokimg.data.loader import BatchLoader
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.engine.engine import TrainEngine
from ds_tokimg.training import health
from tests.support.distributed import run_ranks
from tests.support.runs import _train, learned, metrics, small_flags

pytestmark = pytest.mark.usefixtures("cache")

QUIET = ("--eval_interval", 1000, "--eval_fraction", 0, "--epochs", 9)


def tags(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def latest(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text().strip()


def _with_bad_batches(dist, flags, factors: dict, rank: int) -> str:
    """A run in which the noise of some train batches {(epoch, number): factor} is multiplied on one rank."""
    prepare = BatchLoader._prepare

    def harmed(self, planned):
        batches, place = prepare(self, planned), (planned.epoch, planned.number)
        if dist.rank != rank or place not in factors:
            return batches
        return [batch.replace(noise=batch.noise * factors[place]) for batch in batches]

    BatchLoader._prepare = harmed
    return _train(dist, flags)


def _error_with_bad_batches(dist, flags, factors, rank) -> str:
    with pytest.raises(health.TrainingError) as caught:
        _with_bad_batches(dist, flags, factors, rank)
    return str(caught.value)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_by_all_and_named(stage, corpus, tmp_path):
    folder = tmp_path / "run"
    config = tmp_path / "engine.json"
    config.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": stage}}))
    flags = small_flags(corpus, folder, *QUIET, "--max_steps", 5, "--save_interval", 3, "--log_interval", 2)
    printed = run_ranks(2, _with_bad_batches, [*flags, "--deepspeed_config", str(config)], {(0, 2): math.nan}, 1)[0]
    rows = {row["step"]: row for row in metrics(folder)}
    (images,) = [row["skipped_images"] for row in rows.values() if row.get("skipped")]
    assert rows[3]["skipped"] == "not finite" and rows[3]["loss"] is None and len(images) == 8
    assert f"step 3 is skipped: its loss is not finite; training images {', '.join(map(str, images))}\n" in printed
    assert [rows[step]["skipped_steps"] for step in (2, 3, 4)] == [0, 1, 1]
    assert tags(folder) == ["step_00000004", "step_00000005"]  # what was due at step 3 was put off


def test_too_many_in_a_row_end_the_run_with_where_to_go_on(corpus, tmp_path):
    folder, bad = tmp_path / "run", {(0, number): math.nan for number in range(3, 20)}
    flags = small_flags(corpus, folder, *QUIET, "--max_steps", 15, "--save_interval", 1)
    message = run_ranks(1, _error_with_bad_batches, flags, bad, 0)[0]
    assert "5 steps in a row were skipped, up to step 8, whose loss is nan" in message
    assert f"--resume {folder}/checkpoints/step_00000003" in message
    assert tags(folder)[-1] == latest(folder) == "step_00000003"


def _with_bad_state(dist, flags, where: str) -> str:
    """A run in which NaN gets into a weight, or into an average, after step 3."""
    step = TrainEngine.train_batch

    def harmed(engine, *args):
        if engine.global_steps == 3:
            (weight, *_) = engine.shards.stepped
            target = weight if where == "weight" else engine.optimizer.state[weight][engine.optimizer.average]
            with torch.no_grad():
                target.view(-1)[0] = math.nan
        return step(engine, *args)

    TrainEngine.train_batch = harmed
    with pytest.raises(health.TrainingError) as caught:
        _train(dist, flags)
    return str(caught.value)


@pytest.mark.parametrize(("where", "message"), [("weight", "5 steps in a row were skipped"), ("average", "not saved")])
def test_what_is_not_finite_is_never_saved(where, message, corpus, tmp_path):
    folder = tmp_path / "run"
    flags = small_flags(corpus, folder, *QUIET, "--max_steps", 15, "--save_interval", 1, "--keep_checkpoints", 2)
    text = run_ranks(1, _with_bad_state, flags, where)[0]
    assert message in text and f"--resume {folder}/checkpoints/step_00000003" in text
    assert tags(folder) == ["step_00000002", "step_00000003"] and latest(folder) == "step_00000003"
    for which in ("ema", "trained"):
        weights = checkpoints.load_weights(checkpoints.find(folder), which)
        assert all(value.isfinite().all() for value in weights.values())


def _train_far_too_fast(dist, flags) -> str:
    health.FIRST_STEPS, health.RECENT_STEPS = 2, 4
    return _train(dist, flags)


def test_a_run_that_diverges_says_so_once_and_keeps_a_sane_checkpoint(corpus, tmp_path):
    folder = tmp_path / "run"
    more = ("--lr", 10, "--warmup_ratio", 0, "--max_steps", 24, "--save_interval", 2, "--keep_checkpoints", 2)
    printed = run_ranks(1, _train_far_too_fast, small_flags(corpus, folder, *QUIET, *more))[0]
    assert printed.count("the run has diverged") == 1
    states = {tag: checkpoints.read_state(folder / "checkpoints" / tag) for tag in tags(folder)}
    sane = [tag for tag, state in states.items() if state["sane"]]
    assert len(states) == 3 and sane == [tags(folder)[0]] and latest(folder) == "step_00000024"
    assert all(math.isfinite(loss) for state in states.values() for loss in state["health"]["losses"])
    assert f"--resume {folder}/checkpoints/{sane[0]}" in printed
    resumed = run_ranks(1, _train, ["--resume", str(folder), "--max_steps", "25"])[0]
    assert "note: the checkpoint of step 24 has a loss" in resumed and f"checkpoints/{sane[0]}" in resumed


GUARDED = ("--skip_spikes", 3, "--log_interval", 1, "--save_interval", 4)


def _guarded(dist, flags, factors) -> str:
    health.LEAST_HISTORY = 4
    return _with_bad_batches(dist, flags, factors, 0)


def test_spikes_are_skipped_on_all_ranks_and_after_a_resume_the_same(corpus, tmp_path):
    """Straight through, against killed between two spikes and resumed: what is usual is in the checkpoint."""
    bad = {(0, 6): 50.0, (0, 9): 50.0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed = run_ranks(2, _guarded, small_flags(corpus, whole, *QUIET, *GUARDED, "--max_steps", 12), bad)[0]
    assert printed.count("is skipped: a spike (loss") == 2
    assert [row["step"] for row in metrics(whole) if "skipped" in row] == [7, 10]
    run_ranks(2, _guarded, small_flags(corpus, parts, *QUIET, *GUARDED, "--max_steps", 8), bad)
    run_ranks(2, _guarded, ["--resume", str(parts), "--max_steps", "12"], bad)
    assert learned(metrics(parts)) == learned(metrics(whole))


def test_after_several_the_run_goes_back_and_takes_other_data(corpus, tmp_path):
    """The data that were bad are not seen again, and the run is then the one that never saw them."""
    folder, bad = tmp_path / "run", {(0, number): 50.0 for number in (6, 7, 8)}
    flags = small_flags(corpus, folder, *QUIET, *GUARDED, "--go_back_after", 3, "--max_steps", 12)
    printed = run_ranks(1, _guarded, flags, bad)[0]
    assert f"gone back to {folder}/checkpoints/step_00000004; the data of steps 5 to 9 are left out" in printed
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 13)) and not any("skipped" in row for row in rows)
    assert [row["consumed_samples"] for row in rows] == [8 * (step + 5 * (step > 4)) for step in range(1, 13)]
    assert tags(folder) == ["step_00000004", "step_00000008", "step_00000012"] and latest(folder) == "step_00000012"
    # A fresh process that leaves out the same data from the same checkpoint.
    state = json.loads((folder / "checkpoints" / "step_00000008" / "trainer_state.json").read_text())
    assert state["health"]["batches_left_out"] == 5
    again = run_ranks(1, _guarded, ["--resume", f"{folder}/checkpoints/step_00000008", "--max_steps", "12"], bad)[0]
    assert "resumed" in again and learned(metrics(folder)) == learned(rows)


def test_a_run_without_a_checkpoint_cannot_go_back(corpus, tmp_path):
    bad = {(0, number): math.nan for number in (1, 2)}
    flags = small_flags(corpus, tmp_path / "run", *QUIET, "--go_back_after", 2, "--max_steps", 9, "--save_interval", 9)
    message = run_ranks(1, _error_with_bad_batches, flags, bad, 0)[0]
    assert "2 steps in a row were skipped, up to step 3, and there is no checkpoint to go back to" in message
