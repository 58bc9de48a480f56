"""The engine on real gloo ranks, against a plain PyTorch loop on the whole train batch."""

import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from ds_tokimg.errors import TrainingError
from tests.support.distributed import (
    Tensors,
    TinyModule,
    cut,
    full_state,
    make_batch,
    run_ranks,
    start_ranks,
    tiny_engine,
    train,
)

STEPS = 6
# (stage, ranks, accumulation): each stage on each number of ranks, and with each accumulation. All have been run once.
QUICK = [(0, 1, 4), (0, 2, 2), (1, 2, 1), (1, 1, 2), (2, 2, 2), (3, 2, 1), (3, 4, 2)]
PARTITIONS = [(0, 4, 1), (1, 4, 2), (1, 2, 4), (2, 1, 1), (2, 4, 1), (2, 2, 4), (3, 1, 4)]


def _learning_rate(step: int) -> float:
    """Linear warm-up over 3 of 30 steps, then a cosine to its floor; `step` counts from 1."""
    if step < 3:
        return 1e-2 * step / 3
    return 1e-2 * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * min(1, (step - 2) / 27))) / 2)


def _plain_loop(optimizer_class=torch.optim.AdamW, **settings) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step on one rank, without DeepSpeed and without accumulation."""
    module, results = TinyModule(), []
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2], **settings},
        {"params": [p for p in module.parameters() if p.ndim < 2], **settings, "weight_decay": 0.0},
    ]
    optimizer = optimizer_class(groups, lr=1e-2)
    for step in range(STEPS):
        batch = make_batch(step)
        loss = module(batch)["loss_sum"] / batch["mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step + 1)
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


def _train(dist, stage, accumulation, blocks):
    results = train(tiny_engine(dist, stage, accumulation=accumulation, **blocks), STEPS)
    return [(r.loss, r.grad_norm, r.lr, r.count, round(r.sums["inputs"], 3)) for r in results]


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulation"),
    QUICK + [pytest.param(*partition, marks=pytest.mark.slow) for partition in PARTITIONS],
)
def test_every_partition_trains_as_one_plain_batch(stage, ranks, accumulation):
    per_rank = run_ranks(ranks, _train, stage, accumulation, {})
    assert all(results == per_rank[0] for results in per_rank)
    for step, (expected, result) in enumerate(zip(_plain_loop(weight_decay=0.1), per_rank[0], strict=True)):
        loss, norm, lr, count, inputs = result
        assert (loss, norm) == pytest.approx(expected, rel=2e-5)
        assert lr == pytest.approx(_learning_rate(step + 1))
        batch = make_batch(step)
        assert count == int(batch["mask"].sum())
        assert inputs == pytest.approx(float((batch["x"] * batch["mask"][..., None]).sum()), abs=1e-3)


def _train_with_padding(dist, stage):
    """The second rank has nothing but padding in every micro-batch, the first all of the batch."""
    engine = tiny_engine(dist, stage, accumulation=2, size=16)
    losses = []
    for step in range(STEPS):
        micro_batches = cut(make_batch(step), 0, 1, 2)
        if dist.rank == 1:
            micro_batches = [Tensors(m, mask=torch.zeros_like(m["mask"])) for m in micro_batches]
        losses.append(engine.train_batch(micro_batches).loss)
    return losses


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_of_padding_changes_nothing(stage):
    expected = [loss for loss, _ in _plain_loop(weight_decay=0.1)]
    assert run_ranks(2, _train_with_padding, stage)[0] == pytest.approx(expected, rel=2e-5)


def _meet_nan(dist, stage, blocks):
    """Train, meet a NaN on the last rank alone, train on."""
    engine = tiny_engine(dist, stage, **blocks)
    train(engine, 2)
    before, lr = full_state(engine), engine.lr
    bad = cut(make_batch(99), dist.rank, dist.world_size, 1)
    if dist.rank == dist.world_size - 1:
        bad[0]["x"] = bad[0]["x"] * math.nan
    result = engine.train_batch(bad)
    after = full_state(engine)
    assert (result.skipped, engine.skipped_steps, engine.global_steps) == ("not finite", 1, 3)
    assert result.grad_norm == math.inf and math.isnan(result.loss)
    assert engine.lr == lr and engine.shards.updates == 2
    assert all(torch.equal(before[key], after[key]) for key in before)
    (good,) = train(engine, 1)
    assert not good.skipped and math.isfinite(good.loss) and engine.shards.updates == 3
    return True


@pytest.mark.parametrize("stage", range(4))
def test_steps_that_are_not_finite_are_skipped_by_all(stage):
    assert run_ranks(2, _meet_nan, stage, {}) == [True, True]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_that_are_not_finite_are_skipped_in_bf16(stage):
    assert run_ranks(2, _meet_nan, stage, {"bf16": {"enabled": True}}) == [True, True]


def _refuse(dist, stage, blocks):
    """A step that the caller refuses, one whose loss alone is infinite and on one rank alone, and then that step."""
    engine = tiny_engine(dist, stage, **blocks)
    train(engine, 2)
    before, lr, seen = full_state(engine), engine.lr, []
    batch = cut(make_batch(2), dist.rank, dist.world_size, 1)
    refused = engine.train_batch(batch, lambda loss, norm: seen.append((loss, norm)) or True)
    on_last = math.inf if dist.rank == dist.world_size - 1 else 0.0
    more = engine.module.register_forward_hook(lambda module, args, out: out | {"loss_sum": out["loss_sum"] + on_last})
    infinite = engine.train_batch(batch, lambda loss, norm: False)  # its gradients are finite
    more.remove()
    after = full_state(engine)
    assert (refused.skipped, infinite.skipped, engine.skipped_steps) == ("refused", "not finite", 2)
    assert (refused.loss, refused.grad_norm) == seen[0] and infinite.loss == infinite.grad_norm == math.inf
    assert engine.lr == lr and engine.shards.updates == 2 and engine.loss_scale == 1.0
    assert all(torch.equal(before[key], after[key]) for key in before)
    taken = engine.train_batch(batch, lambda loss, norm: seen.append((loss, norm)))
    assert not taken.skipped and seen[0] == seen[1] and engine.shards.updates == 3
    return seen[0], (taken.loss, taken.grad_norm)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_refused_steps_and_infinite_losses_are_skipped_by_all(stage, precision):
    blocks = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    first, second = run_ranks(2, _refuse, stage, blocks)
    assert first == second
    tolerance = 2e-5 if precision == "fp32" else 0.05
    for loss, norm in first:
        assert (loss, norm) == pytest.approx(_plain_loop(weight_decay=0.1)[2], rel=tolerance)


def _average(dist, stage, blocks):
    """Losses with the averages in place, and with a plain module that got them parameter by parameter."""
    engine = tiny_engine(dist, stage, ema_decay=0.2, **blocks)
    batch = make_batch(1000)

    def loss(module):
        with torch.no_grad():
            return float(module(batch)["loss_sum"])

    with engine.averaged_weights():  # before the first step: the weights themselves
        untrained = loss(engine.module)
    assert untrained == loss(engine.module)
    train(engine, 4)
    before, losses = full_state(engine), {"trained": loss(engine.module)}
    with engine.averaged_weights():
        losses["averaged"] = loss(engine.module)
    assert loss(engine.module) == losses["trained"]
    after = full_state(engine)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for key, name in (("fp32", "trained"), ("ema_0.2", "averaged")):
        plain = TinyModule(seed=5)
        plain.load_state_dict({n: before[f"{n}/{key}"] for n in plain.state_dict()})
        losses[name] = (losses[name], loss(plain.to(engine.module.model[0].weight.dtype)))
    train(engine, 1)
    return losses


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_averaged_weights_and_back(stage, precision):
    blocks = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    for losses in run_ranks(2, _average, stage, blocks):
        assert len({seen for seen, _ in losses.values()}) == 2
        for seen, expected in losses.values():
            assert seen == pytest.approx(expected, rel=1e-6)


def _averages(dist, stage, decay):
    engine = tiny_engine(dist, stage, ema_decay=decay)
    weights = [{n: engine.shards.full(p).clone() for n, p in engine.shards.params.items()}]
    for _ in range(4):
        train(engine, 1)
        weights.append({n: engine.shards.full(p).clone() for n, p in engine.shards.params.items()})
    return weights, full_state(engine), sum(v.numel() for t in engine.shards.stepped for v in [t])


@pytest.mark.parametrize("decay", [0.15, 0.999])  # below what it is warmed to in four steps, and above
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_averages_follow_the_weights(stage, ranks, decay):
    results = run_ranks(ranks, _averages, stage, decay)
    weights, state, held = results[0]
    for name, average in weights[0].items():
        value = average.clone()
        for n, later in enumerate(w[name] for w in weights[1:]):
            value = torch.lerp(value, later, 1 - min(decay, (1 + n) / (10 + n)))
        torch.testing.assert_close(state[f"{name}/ema_{decay}"], value, rtol=1e-6, atol=1e-7)
    total = sum(value.numel() for value in weights[0].values())
    assert held <= total / ranks + 16  # a rank's share and some padding, never a full copy


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_near_fp32(stage):
    results = run_ranks(2, _train, stage, 1, {"bf16": {"enabled": True}})[0]
    for (loss, norm), result in zip(_plain_loop(weight_decay=0.1), results, strict=True):
        assert result[:2] == pytest.approx((loss, norm), rel=0.05)


def _train_fp16(dist, stage, scale):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # in software, slowly
    blocks = {
        "fp16": {"enabled": True, "initial_scale_power": scale, "hysteresis": 1},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},
    }
    engine = tiny_engine(dist, stage, **blocks)
    results = [engine.train_batch(cut(make_batch(0), dist.rank, dist.world_size, 1)) for _ in range(12)]
    assert sum(bool(r.skipped) for r in results) == engine.skipped_steps
    return [(r.loss, r.skipped, r.loss_scale) for r in results]


@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_scales_the_loss_and_skips_overflows(stage):
    """SGD, because Adam would hide a gradient of the wrong scale."""
    reference = TinyModule()
    optimizer = torch.optim.SGD(reference.parameters())
    losses, skipped, scale = zip(*run_ranks(2, _train_fp16, stage, 22)[0], strict=True)
    assert skipped[0] and not skipped[-1]  # the first scale, 2^22, is too large
    assert scale[-1] < 2**22
    batch, taken = make_batch(0), 0
    for loss, skip in zip(losses, skipped, strict=True):
        expected = reference(batch)["loss_sum"] / batch["mask"].sum()
        assert loss == pytest.approx(expected.item(), rel=5e-3)
        if not skip:
            taken += 1
            optimizer.param_groups[0]["lr"] = _learning_rate(taken)
            optimizer.zero_grad()
            expected.backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
    assert taken >= 4


def _stop(dist):
    engine = tiny_engine(dist, 1)
    (first,) = train(engine, 1)
    engine.stop_requested = dist.rank == 1
    (second,) = train(engine, 1)
    with pytest.raises(ValueError, match="2 micro-batches; the engine accumulates 1"):
        engine.train_batch(cut(make_batch(0), 0, 1, 2))
    return first.stop, second.stop


def test_all_ranks_learn_of_a_request_to_stop():
    assert run_ranks(2, _stop) == [(False, True), (False, True)]


def _whole_schedule(dist):
    engine = tiny_engine(dist, 0)
    return [result.lr for result in train(engine, 30)], engine.lr


def test_schedule_starts_above_zero_and_ends_at_its_floor():
    rates, after = run_ranks(1, _whole_schedule)[0]
    assert rates == pytest.approx([_learning_rate(step) for step in range(1, 31)])
    assert rates[0] > 0 and rates[-1] == after == pytest.approx(1e-6)


def _lose_a_rank(dist, stage, is_killed):
    engine = tiny_engine(dist, stage)
    train(engine, 1)
    if dist.rank == 1:
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(200)
    with pytest.raises(TrainingError, match="another rank no longer answers") as caught:
        train(engine, 1)
    return str(caught.value)


@pytest.mark.parametrize(("stage", "is_killed", "reason"), [(0, False, "Timed out"), (3, True, "closed|reset")])
def test_a_rank_that_is_lost_ends_the_others(stage, is_killed, reason):
    processes, results = start_ranks(2, _lose_a_rank, stage, is_killed, timeout_minutes=0.05)
    try:
        rank, message, error = pickle.loads(results.get(timeout=150))
        assert rank == 0 and error is None, error
        assert re.search(reason, message)
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_plain_python_is_one_rank_and_quiet():
    """Nothing but the script's own line: no launcher's variables, no compiler, no chatter."""
    script = (
        "from ds_tokimg.engine.startup import quiet\n"
        "with quiet(): from ds_tokimg.engine.engine import init_distributed\n"
        "from tests.support.distributed import tiny_engine, train;"
        "d = init_distributed(); print(d.rank, d.world_size, train(tiny_engine(d, 1), 2)[1].step)"
    )
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CXX")
    environment = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("DS_")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "0 1 2\n", done.stdout + done.stderr
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr, done.stderr
