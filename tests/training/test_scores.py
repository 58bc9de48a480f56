"""What the validations of a run have found."""

import math
from types import SimpleNamespace

import pytest

from ds_tokimg.training.scores import Scores


def scores(state: dict, kept=True, same_texts=True) -> Scores:
    validations = SimpleNamespace(count=2, were=lambda state: same_texts)
    return Scores(validations, state, lambda step: kept)


def bound(bits: float):
    """Of the first texts; all texts together are worth half a bit more."""
    return SimpleNamespace(bits_of_first=lambda count: bits, bits_per_token=bits + 0.5, figures=dict)


def test_the_best_is_the_lowest_of_the_same_texts():
    found = scores({})
    assert found.best == math.inf and found.state()["best"] is None
    assert found.add(bound(5.0), 10) and not found.add(bound(5.0), 20) and not found.add(bound(math.nan), 30)
    assert (found.best, found.best_step) == (5.0, 10)
    state = found.state()
    assert state["best"] == 5.0 and math.isnan(state["bits_per_token"]) and state["figures"] == {"step": 30}


BEFORE = {"best": 4.0, "best_step": 8, "figures": {"step": 9}}


@pytest.mark.parametrize(
    ("kept", "same_texts", "best"),
    [(True, True, (4.0, 8)), (False, True, (math.inf, None)), (True, False, (math.inf, None))],
)
def test_a_best_whose_checkpoint_is_gone_or_that_read_other_texts_counts_no_more(kept, same_texts, best):
    found = scores(BEFORE, kept, same_texts)
    assert (found.best, found.best_step) == best
    assert found.compares == same_texts and found.figures == {"step": 9}
    found.add(bound(3.0), 12)
    found.go_back(BEFORE)
    assert (found.best, found.best_step) == best
