"""The benchmarks compare like with like, and every script runs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import ROOT, learning
from benchmarks.gpu.check import Check
from benchmarks.gpu.right import largest_deviation
from benchmarks.lengths import valid_shares
from benchmarks.levels import rates
from benchmarks.text import Judge, distinct, entropy
from benchmarks.timing import ratios, spread, take_turns
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.tokens.codec import TokenCodec
from tests.support.distributed import run_ranks
from tests.support.tiny import layout_of, tiny_model

SCRIPTS = {
    "efficiency": "--model JiT-XS/8 --batch 1 --tokens 64 --repetitions 1",
    "overhead": "--model JiT-XS/8 --batch 1 --tokens 64 --repetitions 1",
    "lengths": "--batch 2 --repetitions 1 --data_path {text}",
    "precision": "--model JiT-XS/8 --images 1 --sizes 16 32 --repetitions 1",
    "startup": "--repetitions 1 --data_path {text}",
    "faults": "--kills 2 --ranks 1",
    "soak": "--steps 60 --data_path {text}",
    "growth": "--parts corpus --megabytes 0.1",
    "data": "--megabytes 0.2 --repetitions 1",
    "streaming": "--megabytes 0.2",
    "writing": "--texts 1 --tokens 4 --repetitions 1",
}


def test_rivals_take_turns_and_their_first_rounds_do_not_count():
    calls, now = [], [0.0]

    def rival(name, duration):
        calls.append(name)
        now[0] += duration

    rivals = {"a": lambda: rival("a", 2.0), "b": lambda: rival("b", 3.0)}
    seconds = take_turns(rivals, repetitions=3, warm_up=1, clock=lambda: now[0])
    assert calls == ["a", "b"] * 4
    assert seconds == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert ratios(seconds["b"], seconds["a"]) == [1.5] * 3
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0 to 3.0)"


def _losses(dist) -> tuple[list[float], list[float]]:
    from benchmarks.overhead import PlainLoop
    from benchmarks.trainer import batch_of, engine_of

    config = TrainConfig(data_path="-", model="JiT-XS/8", batch_size=2, max_grad_norm=0.1)
    plain, engine = PlainLoop(config), engine_of(config)
    batch = batch_of(plain.module, config, [64, 40])
    for group in plain.optimizer.param_groups:
        group["lr"] = engine.lr
    return [plain.step(batch) for _ in range(2)], [engine.train_batch([batch]).loss for _ in range(2)]


def test_the_plain_loop_trains_as_the_engine():
    plain, engine = run_ranks(1, _losses)[0]
    assert plain == pytest.approx(engine, rel=1e-5)
    assert plain[0] != plain[1]


def test_shares_that_are_valid():
    assert valid_shares(np.full(64, 112), bucket=True) == (1.0, 1.0)
    # Half of the texts take one patch, of which they leave a quarter, and half take four; apart, none is padding.
    mixed = np.array([12, 64] * 32)
    assert valid_shares(mixed, bucket=True) == (1.0, 38 / 40)
    assert valid_shares(mixed, bucket=False) == (2.5 / 4, 38 / 64)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_tables(script, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join((ROOT / "data" / "web_narrative.txt").read_text().splitlines(keepends=True)[:200]))
    flags = SCRIPTS[script].format(text=text).split()
    command = [sys.executable, "-m", f"benchmarks.{script}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# ") and f"`python -m benchmarks.{script}" in done.stdout and "|---|" in done.stdout


def test_word_salad_and_repetition_are_told_from_text():
    lines = (ROOT / "data" / "web_narrative.txt").read_text().splitlines()[:600]
    judge, real = Judge(lines[50:], order=5), [line for line in lines[:50] if len(line) > 100]
    salad = [" ".join(np.random.default_rng(0).permutation(line.split())) for line in real]
    assert judge.bits_per_character(salad) > judge.bits_per_character(real) + 0.3
    assert judge.bits_per_character(["\u2603" * 20]) > 8  # characters that the judge never saw
    words, repeated = [line.split() for line in real], [line.split()[:5] * 5 for line in real]
    assert distinct(repeated, 3) < 0.5 * distinct(words, 3) < distinct([line.split() for line in salad], 3)
    assert entropy(list("abab")) == 1.0 and entropy(list("aaaa")) == 0.0


@pytest.mark.parametrize("block_size", [0, 1])
def test_the_levels_of_an_untrained_model_add_up_to_the_whole_vocabulary(block_size):
    """It says the same at every level, nothing, so that nothing is lost on the way."""
    model = tiny_model(TokenCodec(16, token_size=2), trained=False, patch_size=2, block_size=block_size)
    text_format = SimpleNamespace(objective="ce")
    trained = SimpleNamespace(model=model, format=text_format, layout=layout_of(model))
    texts = [np.random.default_rng(i).integers(0, 16, 64) for i in range(8)]
    log_snrs = np.linspace(-8, 3.5, 47)  # steps of a quarter
    paid, known = rates(trained, texts, log_snrs)
    assert paid.sum() * 0.25 == pytest.approx(4.0, rel=0.03)
    assert (known is None) == (block_size == 0)
    if block_size:
        np.testing.assert_allclose(known, paid, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("system", "optimizer"), [("left-to-right", "Muon"), ("autoregressive", "AdamW")])
def test_learning_trains_measures_and_writes_texts(system, optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "rows.jsonl")
    flags = ["--system", system, "--positions", "4000", "--batch", "2", "--levels", "1", "--texts", "2"]
    flags += ["--optimizer", optimizer]
    monkeypatch.setattr(sys, "argv", ["benchmarks.learning", *flags, "--write", str(tmp_path / "texts")])
    learning.main()
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert set(row["bits"]) == ({"1", "1, one step"} if system == "left-to-right" else {"0"})
    assert all(5 < figures["bits_per_token"] < 11 for figures in row["bits"].values())
    assert row["positions"] == pytest.approx(4000, rel=0.3)
    written = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "texts").iterdir()}
    assert written.keys() == {"train", "real", system}
    assert len(written[system]) == 2 and all(len(text) > 100 for text in written[system])


@pytest.mark.slow
def test_the_check_of_accelerators_runs_through_without_one(tmp_path):
    """Small, with the CPU in the accelerator's part. `overhead` and `precision` are scripts of their own, see above."""
    page, parts = tmp_path / "gpu.md", "losses runs ranks waits speed kernels data".split()
    command = ["bash", "launch/gpu.sh", "--dry", "--parts", *parts, "--output", str(page)]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert text.count("\n## ") == 8 and "0 failure(s)." in text
    assert "| begun on the CPU, resumed here | the same to the bit |" in text
    assert "JiT-XS/8" in text and "scaled_dot_product_attention" in text


def test_a_process_that_fails_leaves_its_last_words_in_the_table(tmp_path, capsys):
    check = Check.__new__(Check)
    check.output, check.failures = tmp_path / "page.md", 0
    check.rows(("fp32", 1), lambda: [check.run([sys.executable, "-c", "raise ValueError('no | such card')"])])
    assert check.output.read_text() == "| fp32 | 1 | ValueError: no / such card | FAILED |\n"
    check.rows(("fp16", 2), lambda: [{}["loss"]])
    assert check.output.read_text().endswith("| fp16 | 2 | KeyError: 'loss' | FAILED |\n")
    assert check.failures == 2 and capsys.readouterr().err.count("Traceback") == 2


def test_deviations_that_are_not_finite_are_not_small():
    assert largest_deviation([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert largest_deviation([1.0, float("nan")], [1.0, 2.0]) == float("inf")
