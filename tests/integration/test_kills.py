"""Killed at any moment, mostly inside a save, a run goes on as if nothing had happened."""

from collections import Counter

import pytest

from tests.support.kills import (
    VALIDATE,
    draw,
    finish,
    kill_again_and_again,
    leftovers,
    rows_of,
    same_so_far,
    weights_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
KILLS = 30  # python -m benchmarks.faults kills more often


def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(corpus, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    outcomes = kill_again_and_again(corpus, killed, draw(7, KILLS, 2), 2)
    places = Counter(outcome.place for outcome in outcomes)
    assert set(places) == {"save", "start", "validation", "step"} and places["save"] > KILLS / 3, places
    assert [outcome for outcome in outcomes if outcome.orphans] == []
    assert not outcomes[0].rows or outcomes[0].rows[-1]["step"] == 2  # the very first save
    last = max(row["step"] for outcome in outcomes for row in outcome.rows) + VALIDATE
    for folder in (killed, whole):
        finish(corpus, folder, last, 2)
    expected = rows_of(whole)
    assert [outcome for outcome in outcomes if not same_so_far(outcome.rows, expected)] == []
    assert rows_of(killed) == expected and [row["step"] for row in expected] == list(range(1, last + 1))
    assert weights_of(killed) == weights_of(whole)
    assert leftovers(killed) == leftovers(whole) == []
