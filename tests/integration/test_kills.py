"""Killed at any moment, mostly inside a save, a run goes on as if nothing had happened."""

from collections import Counter

import pytest

from tests.support import kills

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
KILLS = 30  # python -m benchmarks.faults kills more often


def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(corpus, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    outcomes = kills.kill_again_and_again(corpus, killed, kills.draw(7, KILLS, 2), 2)
    places = Counter(outcome.place for outcome in outcomes)
    assert set(places) == {"save", "start", "validation", "step"} and places["save"] > KILLS / 3, places
    assert [outcome for outcome in outcomes if outcome.orphans] == []
    assert not outcomes[0].rows or outcomes[0].rows[-1]["step"] == 2  # the very first save
    last = max(row["step"] for outcome in outcomes for row in outcome.rows) + kills.VALIDATE
    for folder in (killed, whole):
        kills.finish(corpus, folder, last, 2)
    expected = kills.rows_of(whole)
    assert [outcome for outcome in outcomes if not kills.same_so_far(outcome.rows, expected)] == []
    assert kills.rows_of(killed) == expected and [row["step"] for row in expected] == list(range(1, last + 1))
    assert kills.weights_of(killed) == kills.weights_of(whole)
    assert kills.leftovers(killed) == kills.leftovers(whole) == []
