"""The words of a run, and its clocks."""

import math

import numpy as np
import pytest

from ds_tokimg.training.bound import Bound
from ds_tokimg.training.report import Stopwatch, error_of, step_line, times_due


def row(**changes) -> dict:
    usual = {"step": 500, "epoch": 0, "loss": 2.5269, "bits_per_token": 5.84, "lr": 6e-3, "grad_norm": 0.76}
    usual |= {"valid_tokens_per_second": 1553.4, "model_flops_per_second": 5e9, "peak_share": 0.23}
    return usual | {"data_wait": 0.01, "padding_fraction": 0.0, "step_seconds": 0.6} | changes


def test_a_step_has_the_few_figures_that_matter():
    line = step_line(row(), 1070, "6:04")
    assert line == "step 500/1070  loss 2.5269  bits/token 5.84  1,553 tokens/s  6:04 left"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": 123456.7},
        {"loss": math.nan},
        {"loss": math.inf, "bits_per_token": math.inf},
        {"bits_per_token": 337.12, "valid_tokens_per_second": 123_456_789.0},
        {"step": 1_000_000, "valid_tokens_per_second": 999_999.4, "bits_per_token": 12.34},
    ],
    ids=str,
)
def test_a_step_fits_eighty_columns(changes):
    line = step_line(row(**changes), max(1070, changes.get("step", 0)), "100:14:25")
    assert len(line) <= 80
    for word in ("step ", "loss ", "bits/token ", "tokens/s", "100:14:25 left"):
        assert word in line


def test_a_step_without_bits_says_none():
    without = row()
    del without["bits_per_token"]
    assert "bits" not in step_line(without, 1070, "6:04")


def test_verbose_lines_have_every_figure():
    line = step_line(row(), 1070, "6:04", verbose=True)
    for word in ("epoch 1", "lr 6.00e-03", "grad norm 0.76", "5 GFLOP/s (23% of peak)", "1% waiting", "0.6 s a step"):
        assert word in line


def bound_of(nats: list[float]) -> Bound:
    texts = np.array(nats)
    return Bound(texts, np.full(len(texts), 10), 30 * len(texts), 1.0, 0.5, {}, 0.0, {}, {})


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(40, 5, 200)
    error = 1.96 * values.std(ddof=1) / math.sqrt(200) / (10 * math.log(2))
    assert error_of(bound_of(values.tolist())) == f" ± {error:.4f} (95 %)"
    assert error_of(bound_of([40.0])) == ""


def test_time_left_counts_what_has_been_measured():
    watch = Stopwatch()
    watch.add("step", 10.0, amount=20)
    ahead = {"step": 100, "validated": 5000, "save": 2}
    assert watch.seconds(ahead) == pytest.approx(50)
    watch.add("validated", 4.0, amount=2000)
    watch.add("save", 1.5)
    watch.add("save", 2.5)
    assert watch.seconds(ahead) == pytest.approx(50 + 10 + 4)


def test_how_often_something_is_due():
    for last, interval in ((1, 1), (10, 3), (12, 4), (7, 10), (100, 7)):
        for step in range(last + 1):
            due = [n for n in range(step + 1, last + 1) if n % interval == 0 or n == last]
            assert times_due(step, last, interval) == len(due), (step, last, interval)
