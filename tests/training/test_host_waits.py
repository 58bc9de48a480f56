"""A training step asks an accelerator for nothing before its result is read, and hands it nothing without notice.

There is no accelerator here. Model and loss run on torch's device `meta`, whose tensors have no values: whoever asks
for one gets an error, as whoever mixes them with tensors of the host. The engine runs on the CPU, where every operation
passes a dispatch mode.
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_tokimg.data.order import TrainBatchSampler
from ds_tokimg.engine.engine import TrainEngine
from ds_tokimg.engine.ranks import OnlyRank
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import train_config
from ds_tokimg.training.assemble import assemble
from ds_tokimg.training.forecast import longest_batch
from tests.support.distributed import run_ranks

RECIPES = ["at-once", "left-to-right", "reference"]
# What makes an accelerator wait for the host or the host for it: values that decide what is done, or how large it is.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"}
METHODS = ("tolist", "numpy", "cpu")


def place() -> str:
    """The innermost line of this project or of DeepSpeed that is being run."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        for package in ("ds_tokimg", "deepspeed"):
            if package in parts and "tests" not in parts:
                return f"{'/'.join(parts[parts.index(package) :])} {frame.name}"
    return "the test"


def assembled(recipe: str, corpus):
    flags = ["--data_path", str(corpus), "--recipe", recipe, "--model", "JiT-XS/2", "--img_size", "16"]
    flags += ["--vocab_size", "300", "--max_tokens", "16", "--palette", "id"]
    return assemble(train_config(flags), OnlyRank(), None)


class OnHost(TorchDispatchMode):
    """Collects where tensors of the host are made or used."""

    def __init__(self):
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.places.add(place())
        return result


class SentNumbers:
    """Collects where tensors are made of the host's numbers, which are then sent: no operation that is dispatched."""

    def __init__(self, monkeypatch):
        self.places: set[str] = set()
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            monkeypatch.setattr(owner, name, self._noted(getattr(owner, name)))

    def _noted(self, original):
        def function(*args, **kwargs):
            self.places.add(place())
            return original(*args, **kwargs)

        return function


@pytest.fixture
def autocast_on_meta(monkeypatch):
    """Autocast knows nothing of the device, and is off there."""
    is_on, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and is_on(*kind))
    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch, "autocast", lambda kind, **rest: nothing() if kind == "meta" else autocast(kind, **rest))


@pytest.mark.parametrize("measures_bound", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_backward_stay_on_the_device(recipe, measures_bound, corpus, autocast_on_meta, monkeypatch):
    parts = assembled(recipe, corpus)
    module, batch = parts.module.to("meta"), longest_batch(parts, 4).to("meta")
    module.measure_bound = measures_bound
    sent = SentNumbers(monkeypatch)
    with OnHost() as seen:
        module(batch)["loss_sum"].backward()
    # The learnt noise levels are decided on the host, and sent once a step from pinned memory.
    table = {f"ds_tokimg/diffusion/schedule.py {name}" for name in ("shares", "_table")}
    assert seen.places <= (table if recipe == "at-once" else set())
    assert sent.places <= ({"ds_tokimg/diffusion/schedule.py shares"} if recipe == "at-once" else set())
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


class Waits(TorchDispatchMode):
    """Counts where values are asked for."""

    def __init__(self):
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func._opname in ("index", "index_put_") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if func._opname in WAITING or by_mask:
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))


def _waits(dist, recipe: str, stage: int, corpus) -> dict[str, int]:
    """Where the third step of a run waits, and how often."""
    parts = assembled(recipe, corpus)
    raw = engine_json.read(engine_json.SHIPPED) | {"zero_optimization": {"stage": stage}, "tensorboard": {}}
    config = train_config(["--data_path", str(corpus), "--lr", "1e-3", "--train_batch_size", "4", "--epochs", "1"])
    machine = engine_json.Machine(1, "cpu", bf16=True, fp16=False)
    settings, _ = engine_json.resolve(raw | {"bf16": {"enabled": stage > 0}}, config, machine, parts.steps_per_epoch)
    engine = TrainEngine(parts.module, settings, 0.999, dist)
    sampler = TrainBatchSampler(parts.train_set.lengths, 4, 0)
    waits = Waits()
    for number, indices in enumerate(sampler.batches(0)[:3]):
        batch = parts.batch_maker(parts.train_set, indices, indices, 0)
        known = engine.module.count(batch)  # of the batch on the host
        engine.module.count = lambda batch, known=known: known
        with waits if number == 2 else contextlib.nullcontext(), asking(waits if number == 2 else None):
            engine.train_batch([batch])
        del engine.module.count
    return dict(waits.places)


@contextlib.contextmanager
def asking(waits: Waits | None):
    """What passes no dispatch mode on a CPU."""
    original = {name: getattr(torch.Tensor, name) for name in METHODS}

    def counted(name):
        def method(self, *args, **kwargs):
            waits.places[place()] += 1
            return original[name](self, *args, **kwargs)

        return method

    if waits is not None:
        for name in METHODS:
            setattr(torch.Tensor, name, counted(name))
    try:
        yield
    finally:
        for name in METHODS:
            setattr(torch.Tensor, name, original[name])


ENGINE, ZERO = "ds_tokimg/engine/engine.py", "deepspeed/runtime/zero/stage_1_and_2.py has_overflow"
NORM = "deepspeed/runtime/utils.py is_invalid_grad_norm"
# The step's result decides whether it is taken: the loss, and whether the gradient is finite. Of ZeRO the second is
# DeepSpeed's to ask, each time when all that was asked before is known already.
RESULT: dict[int, dict[str, int]] = {
    0: {f"{ENGINE} _step": 1, f"{ENGINE} _check_gradients": 1},
    1: {f"{ENGINE} _step": 1, ZERO: 1, NORM: 3},
    2: {f"{ENGINE} _step": 1, ZERO: 1, NORM: 3},
    3: {f"{ENGINE} _step": 1, NORM: 1},
}
# Counts of tokens, which the host has and ranks add up over gloo: no accelerator is asked.
OF_THE_HOST = {"ds_tokimg/engine/ranks.py sum_ints": 1}


@pytest.mark.parametrize(
    ("recipe", "stage"), [*((recipe, 0) for recipe in RECIPES), *(("at-once", n) for n in (1, 2, 3))]
)
def test_a_step_waits_for_its_result_alone(recipe, stage, corpus):
    assert run_ranks(1, _waits, recipe, stage, corpus)[0] == OF_THE_HOST | RESULT[stage]
