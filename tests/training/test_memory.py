"""Memory that is foretold, against engines, checkpoints and allocations that are real."""

import dataclasses
import gc
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ds_tokimg.data.batch import Batch
from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.engine.engine import TrainEngine
from ds_tokimg.model.config import config_of_name
from ds_tokimg.model.jit import JiT
from ds_tokimg.tokens.codec import TokenCodec
from ds_tokimg.training.memory import (
    AllocationCounter,
    Footprint,
    activation_bytes,
    checkpoint_bytes,
    empty_weights,
    largest_micro_batch,
    rank_memory,
)
from ds_tokimg.training.objective import TrainingLoss
from tests.support.distributed import Tensors, engine_config, run_ranks

LAYERS, WIDTH = 16, 128
PARAMETERS = LAYERS * WIDTH**2
# Buckets and gathered weights that are small beside the model, so that what is left are the states.
ZERO = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}


class Stack(nn.Module):
    """Matrices in a row; while `measuring`, a forward notes the memory of all tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        self.measuring, self.alive = False, {}

    def forward(self, batch):
        if self.measuring:
            self.alive = live_storages()
        x = batch["x"].to(self.model[0].weight.dtype)
        return {"loss_sum": self.model(x).float().square().sum()}

    def count(self, batch):
        return len(batch["x"])


def live_storages() -> dict:
    """Address -> memory of every tensor that is alive; whoever keeps the result keeps the memory too."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that dislike being looked at
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    tensors += [value.grad for value in tensors if value.is_leaf and value.grad is not None]
    return {value.untyped_storage().data_ptr(): value.untyped_storage() for value in tensors}


def measure(dist, cases: list, folder: str) -> list[tuple[int, int]]:
    """Of each (stage, precision): bytes of states while gradients are accumulated, and of a checkpoint."""
    results = []
    for number, (stage, precision) in enumerate(cases):
        blocks = {} if precision == "fp32" else {precision: {"enabled": True}}
        config = engine_config(stage, dist.world_size, accumulation=2, **blocks)
        config["zero_optimization"] |= ZERO
        before = live_storages()  # some are an earlier engine's, and would go in the middle of this one's life
        engine = TrainEngine(Stack(), config, 0.9, dist)
        batches = [Tensors(x=torch.randn(1, WIDTH)) for _ in range(2)]
        engine.train_batch(batches)  # the optimiser makes its states
        engine.module.measuring = True
        engine.train_batch(batches)
        states = sum(storage.nbytes() for place, storage in engine.module.alive.items() if place not in before)
        output = Path(folder) / f"case_{number}"
        saved = checkpoints.save(engine, output, {})
        size = sum(file.stat().st_size for file in saved.iterdir())
        results.append((states, size))
        del engine
    return results


def footprint(precision: str = "fp32", **values) -> Footprint:
    zero = values.pop("zero", {})
    settings = {"on_cpu": True, "fixed": 100, "per_sample": 1000, "moments": 2, "averages": 1} | values
    return Footprint(parameters=PARAMETERS, precision=precision, zero=zero, **settings)


CASES = {
    1: [(0, "fp32"), (1, "bf16"), (3, "fp32")],
    2: [(1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "bf16")],
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_states_and_checkpoints_of_real_engines(world_size, tmp_path):
    cases = CASES[world_size]
    measured = run_ranks(world_size, measure, cases, str(tmp_path))[0]
    for (stage, precision), (states, size) in zip(cases, measured, strict=True):
        expected = footprint(precision)
        # DeepSpeed holds on to one more matrix of gradients at stage 1.
        assert states == pytest.approx(rank_memory(expected, stage, world_size).states, rel=0.03), (stage, precision)
        assert size == pytest.approx(checkpoint_bytes(expected, stage), rel=0.03), (stage, precision)


def test_stages_share_what_zero_shares():
    # Bytes per parameter on many ranks: all of it, all but the optimiser's, all but the gradients' too, nothing.
    per_parameter = [rank_memory(footprint(), stage, 10**9).states / PARAMETERS for stage in range(4)]
    assert per_parameter == pytest.approx([20, 8, 4, 0], abs=1e-3)
    assert rank_memory(footprint("bf16"), 0, 1) is None
    assert rank_memory(footprint("bf16"), 1, 1).states == (2 + 2 + 4 + 8 + 4) * PARAMETERS


def test_buckets_count_where_they_are_reserved():
    on_gpu = footprint("bf16", on_cpu=False)
    assert rank_memory(on_gpu, 1, 2).buffers == 2 * 500_000_000
    # Stage 3 scatters out of a copy of what is in the bucket, and gathers all weights of a model as small as this.
    assert rank_memory(on_gpu, 3, 2).buffers == 2 * (500_000_000 + PARAMETERS + PARAMETERS)
    smaller = footprint("bf16", on_cpu=False, zero={"reduce_bucket_size": 1e6, "overlap_comm": True})
    assert rank_memory(smaller, 2, 2).buffers == 2 * 2 * 1_000_000
    assert rank_memory(footprint("bf16"), 1, 2).buffers == 2 * PARAMETERS


def test_gradients_meet_all_activations_only_when_they_are_accumulated():
    once, twice = footprint(), footprint(accumulation=2)
    for stage, more in ((0, 4), (1, 4), (2, 2), (3, 0)):  # bytes a parameter, on two ranks; stage 3 has a buffer anyway
        peaks = [rank_memory(memory, stage, 2).total(100 * PARAMETERS) for memory in (once, twice)]
        assert peaks[1] - peaks[0] == more * PARAMETERS
    # The update needs more than the backward of a small micro-batch.
    assert rank_memory(once, 1, 1).total(0) == (4 + 4 + 4 + 8 + 4 + 4) * PARAMETERS


def test_offloaded_states_are_the_hosts():
    offload = footprint("bf16", on_cpu=False, zero={"offload_optimizer": {"device": "cpu"}})
    memory = rank_memory(offload, 2, 4)
    assert (memory.optimizer, memory.averages) == (0, 0)
    assert memory.host == (4 + 8 + 4) * PARAMETERS / 4


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    expected = footprint()
    memory = rank_memory(expected, 1, 2)
    budget = memory.total(expected.activations(1)) * 10
    most = largest_micro_batch(expected, memory, budget)
    assert memory.total(expected.activations(most)) <= budget < memory.total(expected.activations(most + 1))
    assert largest_micro_batch(expected, memory, memory.states - 1) == 0


def token_module(head: str = "posterior", **options) -> TrainingLoss:
    codec = TokenCodec(300)
    config = config_of_name("JiT-XS/4", img_size=32, head=head, **options)
    model = JiT(codec, dataclasses.replace(config, depth=2))
    return TrainingLoss(model, "ce" if head == "posterior" else "mse")


def token_batch(samples: int, patches: int = 64) -> Batch:
    """Full micro-batch of the module above: 16 tokens a patch, 3 digits a token."""
    return Batch(
        ids=torch.zeros(samples, patches, 16, dtype=torch.int64),
        mask=torch.ones(samples, patches, 16, dtype=torch.bool),
        t=torch.full((samples, patches), 500.0),
        noise=torch.randn(samples, patches, 48),
    )


def drop_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def profiled_peak(module: nn.Module, batch: Batch) -> int:
    """Most bytes alive at a time by the profiler's account of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module(batch)["loss_sum"].backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_counted_allocations_are_the_profilers():
    module, batch = token_module(), token_batch(4)
    drop_gradients(module)
    module(batch)["loss_sum"].backward()  # what is allocated once
    with AllocationCounter() as counter:
        module(batch)["loss_sum"].backward()
    assert counter.peak == pytest.approx(profiled_peak(module, batch), rel=0.05)


@pytest.mark.parametrize("options", [{}, {"head": "linear"}, {"activation_checkpointing": True}])
def test_activations_without_data_are_those_with_data(options):
    with empty_weights():
        empty = token_module(**options)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    real = token_module(**options)
    assert {parameter.device.type for parameter in real.parameters()} == {"cpu"}
    assert sum(map(torch.numel, real.parameters())) == sum(map(torch.numel, empty.parameters()))
    fixed, per_sample = activation_bytes(empty, token_batch(2), token_batch(4), "fp32")
    drop_gradients(real)
    with AllocationCounter() as counter:
        real(token_batch(7))["loss_sum"].backward()
    # Work done in pieces of a fixed size is not quite linear in the samples.
    assert fixed + 7 * per_sample == pytest.approx(counter.peak, rel=0.05)


def test_half_precision_needs_less():
    def per_sample(precision: str) -> int:
        with empty_weights():
            module = token_module()
        return activation_bytes(module, token_batch(2), token_batch(4), precision)[1]

    full, half, autocast = (per_sample(precision) for precision in ("fp32", "bf16", "torch_autocast"))
    assert 0.4 * full < half < 0.9 * full
    assert half <= autocast < full
