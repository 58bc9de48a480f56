"""What the engine's JSON says when a run goes on has effect on the weights, at every ZeRO stage.

The weights after one more step are compared with AdamW as its paper writes it (Loshchilov and Hutter, "Decoupled weight
decay regularization", 2019, algorithm 2), on the states of the checkpoint.
"""

import math

import pytest
import torch

from ds_tokimg.engine import checkpoint
from tests.support.distributed import TinyModule, full_state, make_batch, run_ranks, tiny_engine, train

STEPS = 4  # before the checkpoint
USUAL = {
    "params": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8},
    "schedule": {"total_num_steps": 30, "warmup_num_steps": 3, "cos_min_ratio": 1e-4},
    "gradient_clipping": 1.0,
}
CHANGES = {
    "nothing": {},
    "lr": {"params": {"lr": 3e-2}},
    "weight_decay": {"params": {"weight_decay": 0.7}},
    "no weight_decay": {"params": {"weight_decay": 0.0}},
    "betas": {"params": {"betas": [0.5, 0.7]}},
    "eps": {"params": {"eps": 1e-2}},
    "gradient_clipping": {"gradient_clipping": 0.01},
    "no gradient_clipping": {"gradient_clipping": 0.0},
    "warmup_num_steps": {"schedule": {"warmup_num_steps": 12}},
    "total_num_steps": {"schedule": {"total_num_steps": 9}},
    "cos_min_ratio": {"schedule": {"cos_min_ratio": 0.5, "total_num_steps": 6}},
}


def _settings(change: dict) -> dict:
    return {
        key: {**value, **change.get(key, {})} if isinstance(value, dict) else change.get(key, value)
        for key, value in USUAL.items()
    }


def _engine(dist, stage, change: dict):
    settings = _settings(change)
    return tiny_engine(
        dist,
        stage,
        optimizer={"type": "AdamW", "params": settings["params"]},
        scheduler={"type": "WarmupCosineLR", "params": {**settings["schedule"], "warmup_type": "linear"}},
        gradient_clipping=settings["gradient_clipping"],
    )


def _resume_with_each(dist, stage, folder) -> dict:
    """{change: (weights and states before, after)} of the first step after a resume."""
    engine = _engine(dist, stage, {})
    train(engine, STEPS)
    engine.save(folder, {})
    seen = {}
    for name, change in CHANGES.items():
        engine = _engine(dist, stage, change)
        engine.load(checkpoint.find(folder, "latest", dist), folder)
        assert dist.progress.step == STEPS  # what the others say of this rank, should it be lost before its next step
        before = full_state(engine)
        train(engine, 1)
        seen[name] = (before, full_state(engine))
    return seen if dist.rank == 0 else {}


def _rate(step: int, peak: float, schedule: dict) -> float:
    """Linear warm-up, then a cosine to its floor; `step` counts from 1."""
    warmup, total, floor = (schedule[f"{name}"] for name in ("warmup_num_steps", "total_num_steps", "cos_min_ratio"))
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup + 1) / (total - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def _expected(before: dict, change: dict) -> dict:
    """The weights one step on, by the paper."""
    settings = _settings(change)
    params, lr = settings["params"], _rate(STEPS + 1, settings["params"]["lr"], settings["schedule"])
    module, batch = TinyModule(), make_batch(STEPS)
    module.load_state_dict({name: before[f"{name}/fp32"] for name in module.state_dict()})
    (module(batch)["loss_sum"] / batch["mask"].sum()).backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in module.parameters()))
    clip = settings["gradient_clipping"]
    shrunk = min(1.0, clip / norm) if clip else 1.0
    weights, (beta1, beta2) = {}, params["betas"]
    for name, p in module.named_parameters():
        gradient = p.grad * shrunk
        first = beta1 * before[f"{name}/exp_avg"] + (1 - beta1) * gradient
        second = beta2 * before[f"{name}/exp_avg_sq"] + (1 - beta2) * gradient**2
        update = first / (1 - beta1 ** (STEPS + 1)) / ((second / (1 - beta2 ** (STEPS + 1))).sqrt() + params["eps"])
        decay = params["weight_decay"] if p.dim() > 1 else 0.0  # matrices alone
        weights[name] = p.detach() * (1 - lr * decay) - lr * update
    return weights


@pytest.mark.parametrize("stage", range(4))
def test_the_json_of_a_resumed_run_moves_the_weights(stage, tmp_path):
    seen = run_ranks(2, _resume_with_each, stage, tmp_path)[0]
    unchanged = seen["nothing"][1]
    for name, change in CHANGES.items():
        before, after = seen[name]
        assert all(torch.equal(before[key], seen["nothing"][0][key]) for key in before), name
        for weight, expected in _expected(before, change).items():
            torch.testing.assert_close(after[f"{weight}/fp32"], expected, rtol=1e-4, atol=1e-6, msg=f"{name}: {weight}")
        moved = any(not torch.allclose(after[key], unchanged[key], rtol=1e-4) for key in after if "/fp32" in key)
        assert moved == (name != "nothing"), name


def _loss_scales(dist, stage, folder) -> list:
    """Loss scales of the four steps after a resume under each of some settings of fp16."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # in software, slowly
    usual = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 100}
    engine = tiny_engine(dist, stage, fp16=usual)
    train(engine, 3)
    engine.save(folder, {})
    scales = []
    for change in ({}, {"initial_scale_power": 9}, {"loss_scale_window": 2}, {"loss_scale": 32}):
        engine = tiny_engine(dist, stage, fp16=usual | change)
        engine.load(checkpoint.find(folder, "latest", dist), folder)
        scales.append([result.loss_scale for result in train(engine, 4)])
    return scales


@pytest.mark.parametrize("stage", [1, 3])
def test_the_json_of_a_resumed_run_says_how_the_loss_scale_changes(stage, tmp_path):
    unchanged, another_start, window, fixed = run_ranks(2, _loss_scales, stage, tmp_path)[0]
    assert unchanged == another_start == [64] * 4
    assert window == [
        64,
        128,
        128,
        256,
    ]  # doubled where an even number of steps has gone before, those of the first run too
    assert fixed == [32] * 4
