"""The plan against the run that follows it."""

import dataclasses
import json
import resource
import subprocess
import sys

import pytest
import torch

from ds_tokimg.__main__ import main
from ds_tokimg.commands import plan
from ds_tokimg.engine.ranks import OnlyRank
from ds_tokimg.errors import UserError
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.engine_json import SHIPPED, Machine, read
from ds_tokimg.training import forecast
from ds_tokimg.training.assemble import assemble
from ds_tokimg.training.memory import Footprint, largest_micro_batch, rank_memory
from tests.support.runs import metrics, small_flags, train_in_ranks, write_corpus

pytestmark = pytest.mark.usefixtures("cache")

CPU = Machine(1, "cpu", bf16=True, fp16=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def settings(corpus, *flags) -> TrainConfig:
    return train_config(small_flags(corpus, "unused", *flags))


def planned(corpus, *flags, machine: Machine = CPU, budget=None) -> dict:
    return forecast.make_plan(settings(corpus, *flags), read(SHIPPED), machine, budget)


@pytest.fixture(scope="module")
def shipped_plan(corpus) -> dict:
    """Of two epochs on 2 ranks; none of its flags ends it early."""
    config = dataclasses.replace(settings(corpus, "--epochs", 2, "--gradient_accumulation_steps", 2), max_steps=None)
    return forecast.make_plan(config, read(SHIPPED), dataclasses.replace(CPU, world_size=2), budget=1e9)


def test_the_batch_and_the_schedule(shipped_plan, corpus):
    batch, schedule, data = (shipped_plan[key] for key in ("batch", "schedule", "data"))
    assert (batch["train_batch_size"], batch["micro_batch"], batch["accumulation"]) == (8, 2, 2)
    assert schedule["steps_per_epoch"] == data["images"] // 8
    assert schedule["steps"] == schedule["scheduler_steps"] == 2 * schedule["steps_per_epoch"]
    assert data["images_left_out"] == data["images"] % 8
    assert data["tokens"] == pytest.approx(data["tokens_per_image"] * data["images"])
    assert batch["tokens_per_step"] == pytest.approx(8 * data["tokens_per_image"], abs=1)


def test_what_is_left_open_is_decided_as_in_a_run(corpus):
    """Also on more ranks than a train batch has texts."""
    flags = ["--data_path", str(corpus), "--model", "JiT-XS/4", "--img_size", "16", "--vocab_size", "300"]
    report = forecast.make_plan(train_config(flags), read(SHIPPED), dataclasses.replace(CPU, world_size=8))
    batch = report["batch"]
    assert (batch["train_batch_size"], batch["micro_batch"], batch["accumulation"]) == (4, 1, 1)
    assert report["engine"]["lr"] == 6e-3
    assert report["recipe"] == "at-once"
    assert [what.split()[0] for what in report["automatic"]] == [
        *("lr", "train", str(report["schedule"]["epochs"]), "validation")
    ]


def test_parameters_are_those_of_the_model(shipped_plan, corpus):
    module = assemble(settings(corpus), OnlyRank(), None).module
    assert shipped_plan["model"]["parameters"] == sum(p.numel() for p in module.parameters())


def test_a_run_does_what_was_planned(corpus, tmp_path):
    flags = small_flags(corpus, tmp_path / "run", "--no_packing", "--gradient_accumulation_steps", 2)
    expected = forecast.make_plan(train_config(flags), read(SHIPPED), dataclasses.replace(CPU, world_size=2))
    train_in_ranks(2, flags)
    rows = metrics(tmp_path / "run")
    assert len(rows) == expected["schedule"]["steps"] == 4
    saved = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    saved["tensorboard"]["output_path"] = expected["settings"]["tensorboard"]["output_path"]
    assert saved == expected["settings"]
    assert {row["consumed_samples"] for row in rows} == {8, 16, 24, 32}
    # The run reports these four steps, the plan the first epoch.
    padding = sum(row["padding_fraction"] for row in rows) / len(rows)
    assert expected["data"]["padding_fraction"] == pytest.approx(padding, abs=0.1)


def test_padding_is_that_of_the_batches(corpus):
    config = settings(corpus, "--no_packing", "--batch_size", 1)
    report = forecast.make_plan(config, read(SHIPPED), CPU)
    parts = assemble(config, OnlyRank(), None)
    # One text a micro-batch: only the rest of a text's last patch is padding, 16 tokens a patch.
    lengths = torch.from_numpy(parts.train_set.lengths).float()
    assert report["settings"]["gradient_accumulation_steps"] == 8
    assert report["data"]["padding_fraction"] == pytest.approx(
        1 - float(lengths.sum() / ((lengths / 16).ceil() * 16).sum()), abs=0.01
    )


def test_memory_falls_with_stages_and_ranks(shipped_plan):
    rows = shipped_plan["memory"]["stages"]
    assert [row["stage"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        parts = ("weights", "gradients", "optimizer", "averages")
        peak = max(row["activations"] + row["buffers"], row["workspace"])
        assert row["total"] == sum(row[part] for part in parts) + peak
    totals = shipped_plan["memory"]["total_by_world_size"]
    assert list(totals) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    for stage in (1, 2, 3):
        assert sorted((by_stage[stage] for by_stage in totals.values()), reverse=True) == [
            by_stage[stage] for by_stage in totals.values()
        ]


def test_the_largest_micro_batch_is_consistent_with_the_table(shipped_plan):
    memory = shipped_plan["memory"]
    for row in memory["stages"]:
        most = row["largest_micro_batch"]
        states = sum(row[part] for part in ("weights", "gradients", "optimizer", "averages"))
        for count, fits in ((most, True), (most + 1, False)):
            activations = memory["activations_fixed"] + memory["activations_per_sample"] * count
            needed = states + max(activations + row["buffers"], row["workspace"])
            assert (needed <= 1e9) is fits


def test_muon_keeps_one_moment_of_the_matrices_of_the_blocks(corpus):
    raw = read(SHIPPED)
    muon = raw | {"optimizer": raw["optimizer"] | {"type": "Muon"}}
    plans = [forecast.make_plan(settings(corpus), engine, CPU, None) for engine in (muon, raw)]
    parts = assemble(settings(corpus), OnlyRank(), None)
    matrices = sum(p.numel() for p in parts.module.model.layers.parameters() if p.ndim == 2)
    states = [plan["memory"]["stages"][0]["optimizer"] for plan in plans]
    assert states[1] - states[0] == pytest.approx(4 * matrices, abs=8)


def test_half_precision_has_no_stage_0(corpus):
    report = planned(corpus, "--use_amp")
    assert report["engine"]["precision"] == "bf16"
    assert [row["stage"] for row in report["memory"]["stages"]] == [1, 2, 3]


def test_a_learnt_noise_schedule_needs_no_memory_worth_planning(corpus):
    assert planned(corpus, "--timesteps", "entropic")["memory"] == planned(corpus, "--timesteps", "band")["memory"]


def test_conditions_and_no_averages(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"word {i}", "answer": "meaning " * (1 + i % 5)} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    report = planned(path, "--enable_condition", "--ema_decay", 0)
    assert report["data"]["images"] + report["data"]["eval_images"] == 60
    assert all(row["averages"] == 0 for row in report["memory"]["stages"])


@pytest.mark.slow
def test_the_weights_of_a_large_model_are_never_made(corpus):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    report = planned(corpus, "--model", "JiT-L/4", machine=Machine(8, "cuda", bf16=True, fp16=True), budget=80e9)
    grown = 1000 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert report["model"]["parameters"] > 3e8
    assert grown < report["model"]["parameters"]  # bytes: a quarter of the weights
    assert report["engine"] | {"precision": "bf16", "zero_stage": 1, "accelerator": "cuda"} == report["engine"]


def test_the_command_prints_and_writes(corpus, tmp_path, capsys):
    flags = [*small_flags(corpus, tmp_path / "run"), "--world_size", "2", "--accelerator", "cpu"]
    assert main(["plan", *flags, "--memory_gb", "2", "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    for line in ("8 = 4 micro-batch x 1 accumulation x 2 ranks", "ZeRO stage 1", "1024", "largest micro-batch in 2 GB"):
        assert line in shown
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["batch"]["world_size"] == 2
    assert not (tmp_path / "run").exists()


def test_all_mistakes_at_once_and_before_the_data_is_read(tmp_path, capsys):
    path = tmp_path / "engine.json"
    raw = read(SHIPPED) | {"gradient_cliping": 1, "pipeline": {}, "train_batch_size": 9}
    path.write_text(json.dumps(raw))
    flags = ["--data_path", str(tmp_path / "missing"), "--deepspeed_config", str(path), "--accelerator", "cpu"]
    assert main(["plan", *flags, "--train_batch_size", "7", "--lr", "1", "--world_size", "2"]) == 2
    message = capsys.readouterr().err
    for part in ("gradient_cliping: unknown key", "pipeline: has no effect", "--train_batch_size is 7"):
        assert part in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "leave --resume out"),
        (["--world_size", "0"], "--world_size 0: expected at least 1"),
        (["--memory_gb", "0"], "--memory_gb 0.0: expected a number above 0"),
        (
            ["--accelerator", "cpu", "--train_batch_size", "9", "--batch_size", "2", "--world_size", "2"],
            "train batch of 8 or 12 would fit",
        ),
        (["--accelerator", "cpu", "--model", "JiT-Q/4"], "unknown model 'JiT-Q/4'; available: JiT-XS/2"),
        (["--accelerator", "cpu", "--json", "/no/such/folder/plan.json"], "cannot be written"),
    ],
)
def test_mistakes(corpus, flags, message):
    with pytest.raises(UserError, match=message):
        plan.main([*small_flags(corpus, "unused"), *flags])


def test_help_does_not_wait_for_torch():
    code = "import sys; from ds_tokimg.commands import plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)


def test_a_rank_that_states_alone_fill_has_no_micro_batch():
    footprint = Footprint(10**9, "fp32", 2, 1, {}, on_cpu=True, fixed=0, per_sample=10**6)
    assert largest_micro_batch(footprint, rank_memory(footprint, 0, 1), 19e9) == 0
    assert largest_micro_batch(footprint, rank_memory(footprint, 3, 1000), 19e9) > 10_000


# ---- time ----


def test_a_step_is_measured_and_a_run_is_its_steps_and_validations(corpus):
    flags = ("--max_steps", 20, "--eval_interval", 5, "--eval_tokens", 0)
    report = forecast.make_plan(settings(corpus, *flags), read(SHIPPED), CPU, timed=True)
    time, data = report["time"], report["data"]
    assert time["measured"] and 0 < time["step_seconds"] < 30
    tokens = 4 * data["tokens_per_image"] * data["eval_images"]
    expected = tokens * 2.75 / report["batch"]["tokens_per_step"]  # 8 levels, and drawing in turn
    # Held-out images are not all full.
    assert time["validation_seconds"] == pytest.approx(expected * time["step_seconds"], rel=0.2)
    assert time["seconds"] == pytest.approx(20 * time["step_seconds"] + time["validation_seconds"])
    (line,) = [line for line in plan.as_text(report).splitlines() if line.startswith("time")]
    assert "of it validation" in line and "(measured)" in line


def test_what_takes_too_long_to_measure_is_estimated(corpus, monkeypatch):
    monkeypatch.setattr("ds_tokimg.training.duration.LONGEST_SECONDS", 0.0)
    report = forecast.make_plan(settings(corpus), read(SHIPPED), CPU, timed=True)
    assert not report["time"]["measured"] and report["time"]["step_seconds"] > 0
    assert "estimated from its operations" in plan.as_text(report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_another_kind_of_machine_cannot_be_measured(corpus):
    report = forecast.make_plan(settings(corpus), read(SHIPPED), Machine(1, "cuda", bf16=True, fp16=True), timed=True)
    assert report["time"] is None
    assert "this machine has no cuda to measure it on" in plan.as_text(report)
