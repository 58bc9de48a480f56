"""Nothing grows in a run that saves and validates all the time."""

import pytest

from benchmarks.soak import KEEP, checkpoints_of, of, soak
from tests.support.runs import metrics, write_corpus


@pytest.mark.slow
def test_memory_handles_threads_and_disk_stay_what_they_are(tmp_path):
    steps, save_interval, eval_interval = 500, 20, 50  # python -m benchmarks.soak makes 2,000
    samples = list(soak(write_corpus(tmp_path), tmp_path / "run", steps, save_interval, eval_interval))
    assert {*range(save_interval, steps + 1, save_interval)} <= {sample.step for sample in samples}  # and new best ones
    steady = samples[len(samples) // 5 :]  # after the first validations
    early, late = steady[: len(steady) // 3], steady[-len(steady) // 3 :]
    assert of(late, "resident") < of(early, "resident") + 8  # MiB
    for name in ("handles", "threads"):
        assert of(late, name) <= of(early, name) + 1  # one more a save, or a validation, would be five and more
    assert of(late, "disk") <= 1.1 * of(early, "disk")
    root = tmp_path / "run" / "checkpoints"
    newest = {f"step_{step:08d}" for step in range(steps, steps - KEEP * save_interval, -save_interval)}
    # The last save came before the last validation: what was the best one then is still there.
    *earlier, last = (row for row in metrics(tmp_path / "run") if "val_bits_per_token" in row)
    before = min(earlier, key=lambda row: row["val_bits_per_token"])
    best = min(before, last, key=lambda row: row["val_bits_per_token"])
    assert (root / "best").read_text().strip() == f"step_{best['step']:08d}"
    kept = newest | {f"step_{row['step']:08d}" for row in (before, best)}
    assert set(checkpoints_of(tmp_path / "run")) == kept | {"latest", "best"}
