"""What a training step needs in memory, without running it.

Weights, gradients, optimiser state and averages follow from the number of parameters, the ZeRO stage and the world
size (Rajbhandari et al., "ZeRO", 2020, section 3, with what DeepSpeed 0.19.8 really keeps: fp32 masters at stages
1 to 3 even in fp32, buckets of a fixed size). Activations are measured: the model runs forward and backward on
tensors that have shapes and no data, while every allocation is counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_tokimg.data.batch import Batch
from ds_tokimg.settings.engine_json import CPU_BUCKET_SIZE

STAGES = (0, 1, 2, 3)
HALF = ("bf16", "fp16")
# Tensors as large as the weights that an optimiser keeps.
MOMENTS = {"AdamW": 2, "Adam": 2, "SGD": 0, "Muon": 2}
# DeepSpeed's own sizes, in elements, where the JSON has none.
REDUCE_BUCKET_SIZE = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Footprint:
    """What decides the memory of a run, apart from the ZeRO stage and the world size.

    parameters: trained ones. precision: "fp32", "bf16", "fp16" or "torch_autocast". moments, averages: tensors as
    large as the weights in the optimiser (a fraction where only some have one). zero: the block `zero_optimization` of
    the JSON. on_cpu: memory that is reserved and never touched does not count. fixed, per_sample: bytes of activations,
    see `activation_bytes`. accumulation: micro-batches a step.
    """

    parameters: int
    precision: str
    moments: float
    averages: int
    zero: dict
    on_cpu: bool
    fixed: int
    per_sample: int
    accumulation: int = 1

    @property
    def width(self) -> int:
        """Bytes of a weight and of its gradient."""
        return 2 if self.precision in HALF else 4

    def activations(self, micro_batch: int) -> int:
        """Bytes that the forward and backward of a micro-batch need beside weights and gradients."""
        return self.fixed + self.per_sample * micro_batch


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. `host`: what is offloaded. `workspace`: copies of gradients after the backward.

    `gradients_stay`: they are there already when a backward begins, from the micro-batch before or in a buffer.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    buffers: int
    workspace: int
    host: int
    gradients_stay: bool

    @property
    def states(self) -> int:
        """What is there when a step ends."""
        return self.weights + self.gradients + self.optimizer + self.averages

    @property
    def backward(self) -> int:
        """What is there beside the activations when a backward begins: they are the most then, gradients come later."""
        return self.states + self.buffers - (0 if self.gradients_stay else self.gradients)

    def total(self, activations: int) -> int:
        """The peak: when a backward begins, or in the update after it."""
        return max(self.backward + activations, self.states + self.workspace)


def rank_memory(footprint: Footprint, stage: int, world_size: int) -> RankMemory | None:
    """The memory of one rank; None for half precision at stage 0, which runs as stage 1."""
    if stage == 0 and footprint.precision in HALF:
        return None
    size, width = footprint.parameters, footprint.width
    part = -(-size // world_size)
    held = part if stage else size  # parameters whose optimiser state is here
    masters = 1 if stage else 0
    optimizer, averages = round(4 * (masters + footprint.moments) * held), 4 * footprint.averages * held
    device = footprint.zero.get("offload_optimizer", {}).get("device", "none")
    offloaded = stage > 0 and device != "none" and not footprint.on_cpu
    return RankMemory(
        weights=width * (part if stage == 3 else size),
        gradients=width * (part if stage >= 2 else size),
        optimizer=0 if offloaded else optimizer,
        averages=0 if offloaded else averages,
        buffers=_buffers(footprint, stage, world_size),
        workspace=_workspace(footprint, stage, world_size, offloaded),
        host=optimizer + averages if offloaded else 0,
        gradients_stay=stage == 3 or footprint.accumulation > 1,
    )


def _workspace(footprint: Footprint, stage: int, world_size: int, offloaded: bool) -> int:
    """Stage 0 averages gradients after the backward, in copies; ZeRO makes fp32 gradients for the update."""
    if stage == 0:
        bucket = int(footprint.zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))
        return footprint.width * min(bucket, footprint.parameters) if world_size > 1 else 0
    return 0 if offloaded else 4 * -(-footprint.parameters // world_size)


def _buffers(footprint: Footprint, stage: int, world_size: int) -> int:
    """Buckets in which gradients are reduced, and at stage 3 the weights that are gathered to compute with."""
    if stage == 0:
        return 0
    zero, size = footprint.zero, footprint.parameters
    bucket = int(zero.get("reduce_bucket_size", CPU_BUCKET_SIZE if footprint.on_cpu else REDUCE_BUCKET_SIZE))
    filled = min(bucket, size)  # of a bucket, by gradients
    if footprint.on_cpu:
        bucket = filled
    if not zero.get("contiguous_gradients", True):
        bucket = 0
    if stage < 3:
        return footprint.width * bucket * (2 if zero.get("overlap_comm") else 1)
    gathered = 0 if footprint.on_cpu and world_size == 1 else size
    live = zero.get("stage3_max_live_parameters", zero.get("max_live_parameters", MAX_LIVE_PARAMETERS))
    # Stage 3 scatters out of a copy of the bucket.
    return footprint.width * (bucket + filled + min(gathered, int(live)))


def largest_micro_batch(footprint: Footprint, memory: RankMemory, budget: float) -> int:
    """The most samples in a micro-batch with which a rank stays within `budget` bytes; 0 when none fits."""
    if memory.states + memory.workspace > budget:
        return 0
    left = budget - memory.backward - footprint.fixed
    return max(0, int(left // footprint.per_sample))


def checkpoint_bytes(footprint: Footprint, stage: int) -> int:
    """Size of a checkpoint: whole fp32 weights and averages for all to read, and the engine's own files."""
    size, averages = footprint.parameters, footprint.averages
    readable = 4 * (1 + averages)
    masters = 1 if stage else 0
    engine = (footprint.width if stage < 3 else 0) + 4 * (masters + footprint.moments + averages)
    return int(size * (readable + engine))


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Modules built inside have parameters without data, on the device "meta": a model of any size costs nothing."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]  # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def activation_bytes(module: nn.Module, small: Batch, large: Batch, precision: str) -> tuple[int, int]:
    """(fixed, per sample) bytes of activations, from two micro-batches of different size.

    `module`: built under `empty_weights`, `module(batch) -> {"loss_sum": ...}`; it is used up. Everything that a
    step allocates grows linearly with the samples.
    """
    if precision in HALF:
        module = module.to(torch.bfloat16 if precision == "bf16" else torch.float16)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            # Gradients are counted elsewhere.
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        peaks = [_peak_bytes(module, batch, mode, precision) for batch in (small, large)]
    few, many = (len(batch.ids) for batch in (small, large))
    per_sample = (peaks[1] - peaks[0]) // (many - few)
    return max(0, peaks[0] - per_sample * few), per_sample


def _peak_bytes(module: nn.Module, batch: Batch, mode: FakeTensorMode, precision: str) -> int:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "torch_autocast")
    with AllocationCounter() as counter:
        with autocast:
            loss = module(batch.map(mode.from_tensor))["loss_sum"]
        loss.backward()
    return counter.peak


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while it is active; `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given:  # else a view, or written in place
                self._add(storage)
        return result

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _storages(values) -> list:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
