"""Tables of what was learnt: which rows count as what, and what is read off them."""

from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from benchmarks import learning, tables
from benchmarks.tables import MEGAFLOPS, Row, compute_gap, curve, figure


def row(system="autoregressive", million=1.0, bits=4.0, path="0", **more) -> Row:
    values = {"corpus": "text", "settings": [], "seed": 0, "batch": 2, "lr": 3e-3, "note": "", "optimizer": "AdamW"}
    values |= {"weights": "ema", "positions": million * 1e6, "tokens": int(million * 1e6), "seconds": 1.0}
    values |= {"bits": {path: {"bits_per_token": 3 * bits, "bits_per_byte": bits}}}
    return Row(system=system, **values | more)


def test_rows_of_trials_are_no_rows_of_a_recipe():
    at_once = {"settings": ["timesteps=entropic"], "lr": 6e-3}
    assert row("ours").recipe == "left-to-right" and row("plain", **at_once).recipe == "at-once"
    assert row("plain").recipe is None and row("plain", settings=["timesteps=entropic"]).recipe is None
    assert row("at-once", lr=6e-3).recipe == "at-once" and row("at-once").recipe is None
    for trial in (
        {"settings": ["radix=2"]},
        {"note": "a first version"},
        {"optimizer": "Muon"},
        {"weights": "trained"},
    ):
        assert row("ours", **trial).recipe is None


def test_a_figure_is_the_best_batch_over_its_seeds():
    rows = [row(bits=2.0), row(bits=3.0, seed=1), row(bits=2.6, batch=4), row(bits=1.0, million=1.1)]
    assert figure(rows, "autoregressive", "text", 1) == 2.5
    assert figure(rows, "autoregressive", "text", 4) is None
    # Of our recipes only the bound of what `generate` does is a figure.
    assert figure([row("ours", path="1")], "left-to-right", "text", 1) is None
    assert figure([row("ours", path="1, one step")], "left-to-right", "text", 1) == 4.0


def test_compute_gap_is_read_off_the_reference_at_equal_bits():
    rows = [row(million=1, bits=4.0), row(million=4, bits=2.0), row(million=4, bits=3.0), row(million=8, bits=2.5)]
    points = curve(rows, "autoregressive", "text")
    flops = MEGAFLOPS["autoregressive"]
    assert points == [(flops, 4.0), (4 * flops, 2.0)]  # more compute that did not help is left out
    assert compute_gap(6 * flops, 3.0, points) == "3.0"  # between 1 and 4, in the logarithm: at 2
    assert compute_gap(6 * flops, 4.5, points) == "> 6.0" and compute_gap(6 * flops, 1.5, points) == "< 1.5"
    assert compute_gap(1.0, 1.0, []) == ""


def test_every_table_has_a_page_and_every_page_its_tables():
    named = [name for page in tables.PAGES for _, name, _ in tables.TABLE.findall(page.read_text(encoding="utf-8"))]
    assert sorted(named) == sorted(tables.TABLES)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["left-to-right", "at-once"])
def test_operations_a_token_are_those_that_are_counted(recipe):
    options = {"system": recipe, "set": [], "tokenizer": None, "corpus": "web_narrative", "seed": 0}
    trained = learning.prepare(SimpleNamespace(**options))
    texts = trained.parts.train_set
    batch = trained.maker(texts, np.arange(2), np.arange(2), 0)
    flops = trained.module.flops(batch) / texts.lengths[:2].sum()
    assert flops / 1e6 == pytest.approx(MEGAFLOPS[recipe], abs=0.01)


@pytest.mark.parametrize("system", [name for name in MEGAFLOPS if name not in ("left-to-right", "at-once")])
def test_operations_a_token_of_the_references(system):
    kind, _, shift = system.partition(", ")
    reference = {"autoregressive": learning.Autoregressive, "masked": learning.MaskedDiffusion}[kind]
    depth, width, length = 6, 192, 256
    model = reference(1024, 0, (depth, width, 6), shift=bool(shift)).model
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    flops = 3 * (2 * weights + depth * 4 * length * width)
    assert flops / 1e6 == pytest.approx(MEGAFLOPS[system], abs=0.01)
