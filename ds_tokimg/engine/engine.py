"""The trained module inside a DeepSpeed engine.

One `TrainEngine.train_batch` is one optimiser step on one train batch, and its gradient does not depend on how the
batch was cut into ranks and micro-batches: the sum over the valid pixels of a micro-batch is divided by the valid
pixels of the whole train batch.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from ds_tokimg.engine import checkpoint, environment, startup
from ds_tokimg.engine.optimizer import AveragedMuon, build_optimizer
from ds_tokimg.engine.ranks import Dist, answering
from ds_tokimg.engine.shards import Shards
from ds_tokimg.engine.skipping import LOSS_SCALE, NOT_FINITE, REFUSED, discarding
from ds_tokimg.errors import TrainingError
from ds_tokimg.settings.tensors import read_pickled

DEFAULT_TIMEOUT_MINUTES = 30
DEEPSPEED_CLIPS_AT = 1.0  # its gradient_clipping where the JSON has none
# Settings of zero_optimization that decide which part of a parameter lies where.
PARTITION_SETTINGS = (
    *("sub_group_size", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size"),
    *("offload_optimizer", "offload_param"),
)
# What the files of a checkpoint may hold besides tensors and plain values: nothing else is ever unpickled.
CHECKPOINT_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _member(enumeration: Any, name: str) -> ZeroStageEnum:
    """What early releases of Python 3.11 write down for a member of an enumeration: getattr(enumeration, name)."""
    if enumeration is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"{name!r} of {enumeration!r} does not belong into a checkpoint")
    return ZeroStageEnum[name]


# The built-in itself would open a way to everything that can be reached from the classes above.
CHECKPOINT_CLASSES += [(_member, f"{module}.getattr") for module in ("builtins", "__builtin__")]


def init_distributed(timeout_minutes: float | None = None) -> Dist:
    """Join the process group; a plain `python` becomes the only rank of one.

    `timeout_minutes` is how long it waits for the other ranks, and the limit of a collective outside of `watched`
    (default: DEEPSPEED_TIMEOUT in minutes, else 30). Raises TrainingError where not all come.
    """
    environment.complete(get_accelerator().device_count() if get_accelerator().device_name() != "cpu" else 0)
    if timeout_minutes is None:
        timeout_minutes = float(os.environ.get("DEEPSPEED_TIMEOUT", DEFAULT_TIMEOUT_MINUTES))
    timeout = timedelta(minutes=timeout_minutes)
    startup.hush()
    with startup.without_host_kernels():
        try:
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
        except torch.distributed.DistError as error:
            place = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise TrainingError(
                f"the {os.environ['WORLD_SIZE']} ranks do not meet at {place} (within {timeout_minutes:g} minutes): "
                f"one did not start, or its host does not reach the first. [{error}]"
            ) from None
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    local_rank = int(os.environ["LOCAL_RANK"])
    return Dist(local_rank, torch.device(get_accelerator().device_name(local_rank)), timeout)


def machine_capabilities():
    """What this machine offers a run -> engine_json.Machine. Needs `init_distributed` first for the world size."""
    from ds_tokimg.settings.engine_json import Machine

    accelerator = get_accelerator()
    return Machine(
        world_size=environment.world_size(),
        accelerator=accelerator.device_name(),
        bf16=bool(accelerator.is_bf16_supported()),
        fp16=bool(accelerator.is_fp16_supported()),
    )


def read_engine_file(path: Path) -> dict:
    """One of the engine's files, memory-mapped, without running code that it may hold (then UserError)."""
    return read_pickled(path, CHECKPOINT_CLASSES, mmap=True)


@dataclass
class StepResult:
    """What one optimiser step did. Tensors are read (and an accelerator waited for) only when a property is."""

    step: int  # optimiser steps so far, this one and skipped ones included
    count: int  # valid pixels of the train batch, all ranks
    lr: float  # learning rate of this step
    loss_scale: float
    skipped: str  # why nothing was changed, see skipping.py; empty: the step was taken
    stop: bool  # a rank was asked to end; the same on every rank
    names: list[str]
    totals: Tensor  # [len(names)] float64: sums over all micro-batches and ranks
    norm: float | Tensor | None

    @property
    def sums(self) -> dict[str, float]:
        """The module's outputs, each summed over the train batch."""
        return dict(zip(self.names, self.totals.tolist(), strict=True))

    @property
    def loss(self) -> float:
        """Mean over the train batch's valid pixels; infinite or NaN when the step was skipped for it."""
        return self.sums["loss_sum"] / max(self.count, 1)

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient before clipping; infinite when it, or the loss, was not finite."""
        return float("inf") if self.norm is None else float(self.norm)


class TrainEngine:
    """A module, its optimiser and its averaged weights in a DeepSpeed engine.

    Args:
        module: `module(batch) -> {"loss_sum": scalar with gradient, float32, ...}` (other values are detached sums),
            and `module.count(batch) -> int`, the valid pixels of a micro-batch.
        ds_config: the DeepSpeed JSON, resolved (no "auto" left).
        ema_decay: of the weights' moving average, in (0, 1); 0: none is kept.
        dist: of `init_distributed`.
    """

    read_file = staticmethod(read_engine_file)  # for elastic.py, which does not import deepspeed

    def __init__(self, module: nn.Module, ds_config: dict, ema_decay: float, dist: Dist):
        self.dist = dist
        self.ds_config = ds_config
        self.ema_decay = ema_decay
        self.stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
        self.max_grad_norm = float(ds_config.get("gradient_clipping", DEEPSPEED_CLIPS_AT))
        self.stop_requested = False
        names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(names, ds_config["optimizer"], ema_decay)
        # Written down before ZeRO puts flat buffers in the parameters' place.
        self._groups = [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        self._shapes = {name: list(p.shape) for p, name in names.items()}
        startup.import_muon()
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=self._engine_config(), dist_init_required=False
        )
        dist.limit()
        if self.stage == 0 and dist.world_size == 1:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients there and back
        self.shards = Shards(self.engine, self.optimizer, self.stage)
        if isinstance(self.optimizer, AveragedMuon) and self.stage > 0:
            self.optimizer.locate = self.shards.places
        self._first_learning_rate()

    def _engine_config(self) -> dict:
        """The JSON as DeepSpeed gets it: what this class does itself is left out."""
        config = copy.deepcopy(self.ds_config)
        config.pop("optimizer")  # it would be overruled by ours without a word
        config["zero_allow_untested_optimizer"] = True
        # Ranks may share a train batch unevenly; DeepSpeed wants whole micro-batches, and only counts samples with it.
        micro_batch, accumulation = (
            config[key] for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        config["train_batch_size"] = micro_batch * accumulation * self.dist.world_size
        if self.stage == 1 and self.dist.device.type == "cpu":
            # Without this DeepSpeed copies each gradient to a buffer and back before it is reduced.
            config["zero_optimization"].setdefault("contiguous_gradients", False)
        # At stage 0 _check_gradients clips, which knows the norm anyway.
        config["gradient_clipping"] = 0.0 if self.stage == 0 else self.max_grad_norm
        return config

    def _first_learning_rate(self) -> None:
        """DeepSpeed's warm-up starts at a rate of zero, for one or two updates: start where it starts to rise."""
        scheduler = self.engine.lr_scheduler
        for _ in range(2):
            if scheduler is not None and self.lr == 0.0:
                scheduler.step()

    @property
    def module(self) -> Any:
        """The module itself, an nn.Module with `count`, for validation (under ZeRO-3 all ranks must run the same
        forwards)."""
        return self.engine.module

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    @property
    def global_steps(self) -> int:
        """Optimiser steps so far, skipped ones included."""
        return self.engine.global_steps

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because the gradients were not finite."""
        return self.engine.skipped_steps

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step and rank."""
        return self.engine.gradient_accumulation_steps()

    @property
    def loss_scale(self) -> float:
        """Scale of the loss under fp16, else 1."""
        return float(self.engine.optimizer.cur_scale) if self.engine.fp16_enabled() else 1.0

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16": the weights that the module computes with."""
        return "fp16" if self.engine.fp16_enabled() else "bf16" if self.engine.bfloat16_enabled() else "fp32"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the module's matrix products."""
        if self.ds_config.get("torch_autocast", {}).get("enabled"):
            return getattr(torch, self.ds_config["torch_autocast"].get("dtype", "bfloat16"))
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def layout(self) -> dict:
        """How weights and optimiser state lie in the engine's files: two engines of equal layout read each other's."""
        zero = self.ds_config.get("zero_optimization", {})
        return {
            "stage": self.stage,
            "partitions": self.dist.world_size if self.stage > 0 else 1,
            "precision": self.precision,
            "optimizer": type(self.optimizer).__name__,
            "groups": self._groups,
            "params": self._shapes,
            "zero": {key: zero[key] for key in PARTITION_SETTINGS if key in zero},
        }

    def train_batch(self, micro_batches: list, refuses: Callable[[float, float], bool] | None = None) -> StepResult:
        """One optimiser step. Collective: every rank calls it with `accumulation` micro-batches, which are
        whatever the module takes that has a method `to(device)`.

        A micro-batch may be all padding (count 0): it adds nothing to the gradient, but its forward and backward run,
        so that no rank leaves out a collective alone. Where the loss or a gradient of any rank is not finite, all ranks
        skip the step: weights, averages, moments and schedule stay as they are.

        Args:
            refuses: whether a step of this loss and gradient norm, both of the whole train batch and finite, is to be
                skipped too. Every rank asks it the same.

        Raises TrainingError where another rank no longer answers.
        """
        progress = self.dist.progress
        progress.doing = "training"
        with answering():
            result = self._step(micro_batches, refuses)
        progress.step, progress.open_ended = result.step, False
        return result

    def _step(self, micro_batches: list, refuses) -> StepResult:
        if len(micro_batches) != self.accumulation:
            raise ValueError(f"{len(micro_batches)} micro-batches; the engine accumulates {self.accumulation}")
        count, stop = self._agree_on_count(micro_batches)
        # DeepSpeed averages gradients over ranks; the sum over micro-batches stays a sum (scale_wrt_gas=False).
        scale = self.dist.world_size / max(count, 1)
        lr, totals = self.lr, None
        for index, micro_batch in enumerate(micro_batches):
            outputs = self.engine(micro_batch.to(self.dist.device))
            self.engine.backward(outputs["loss_sum"] * scale, scale_wrt_gas=False)
            values = torch.stack([outputs[name].detach().double() for name in sorted(outputs)])
            totals = values if totals is None else totals + values
            if index < len(micro_batches) - 1:
                self.engine.step()  # DeepSpeed counts it, and does nothing else
        assert totals is not None  # the engine accumulates one micro-batch or more
        if self.dist.world_size > 1:
            torch.distributed.all_reduce(totals)
        names = sorted(outputs)
        loss = float(totals[names.index("loss_sum")]) / max(count, 1)
        skipped, norm = self._update(loss, refuses)
        return StepResult(self.global_steps, count, lr, self.loss_scale, skipped, stop, names, totals, norm)

    def _update(self, loss: float, refuses) -> tuple[str, float | Tensor | None]:
        """The optimiser's step on the gradients of the whole train batch, or none -> why it was skipped, the norm."""
        norm: float | Tensor | None = self._check_gradients() if self.stage == 0 else None
        refused = False
        if refuses is not None and math.isfinite(loss):
            norm = float(self._norm_before_step() if norm is None else norm)
            refused = math.isfinite(norm) and refuses(loss, norm)
        if not (refused or not math.isfinite(loss)):
            self.engine.step()
            if self.engine.was_step_applied():
                return "", self.engine.get_global_grad_norm()
            return (LOSS_SCALE if self.engine.fp16_enabled() else NOT_FINITE), math.inf
        with discarding(self.shards.zero, self.stage):
            self.engine.step()
        return (REFUSED, norm) if refused else (NOT_FINITE, math.inf)

    @torch.no_grad()
    def _norm_before_step(self) -> float:
        """Norm of the whole gradient at stages 1 to 3; infinite where it is not finite. Collective."""
        zero = self.shards.zero
        scaled = combine_grad_norm_groups(zero._get_norm_groups()) if self.stage == 3 else zero.scaled_global_norm()
        return math.inf if is_invalid_grad_norm(scaled) else float(scaled) / float(zero.loss_scale)

    def _agree_on_count(self, micro_batches: list) -> tuple[int, bool]:
        """Valid pixels of the train batch, and whether any rank was asked to stop: one small all-reduce."""
        local_count = sum(int(self.module.count(micro_batch)) for micro_batch in micro_batches)
        count, stop = self.dist.sum_ints([local_count, int(self.stop_requested)])
        return count, stop > 0

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop: the same on every rank. Collective."""
        return self.dist.sum_ints([int(self.stop_requested)])[0] > 0

    @torch.no_grad()
    def _check_gradients(self) -> Tensor:
        """Stage 0: norm, clipping, and no step on gradients that are not finite. ZeRO does all of this by itself.

        The gradients are already averaged, so every rank decides the same. Returns the norm before clipping.
        """
        params = [p for p in self.module.parameters() if p.requires_grad]
        for p in params:
            if p.grad is None:  # no micro-batch used it; it decays all the same, as it does under ZeRO
                p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        self.optimizer._global_grad_norm = norm
        self.optimizer.overflow = not bool(torch.isfinite(norm))
        if self.optimizer.overflow:
            self.engine.zero_grad()
        elif self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(params, self.max_grad_norm, norm)
        return norm

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Averaged weights in the module, the trained ones again afterwards, bit for bit. Collective. Without an
        average, or before the first step, the trained weights stay in place."""
        with self.dist.progress.while_doing("validating"):
            if self.optimizer.average is None:
                yield
                return
            with self.shards.swapped(self.optimizer.average):
                yield

    def save(self, output_dir: str | Path, state: dict, *, best: bool = False, keep: int = 3) -> Path:
        """Write a checkpoint, see checkpoint.save. Collective."""
        return checkpoint.save(self, output_dir, state, best=best, keep=keep)

    def load(self, folder: str | Path, work_dir: str | Path | None = None) -> dict:
        """Continue from a checkpoint, see checkpoint.load; returns the trainer's state. Collective."""
        return checkpoint.load(self, folder, work_dir)

    def load_same_layout(self, folder: Path) -> None:
        """DeepSpeed's own loading, for a checkpoint of this engine's layout."""
        # Its reader would run whatever code a file holds.
        self.engine.checkpoint_engine.load = lambda path, map_location=None: read_engine_file(Path(path))
        # It would look for this one file with the folder's name as a pattern: in `run1` for a run in `run[1]`.
        self.engine._get_all_ckpt_names = lambda root, tag: [self.engine._get_ckpt_name(root, tag)]
        scaler = self.shards.zero.loss_scaler if self.stage > 0 else None
        loaded, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise TrainingError(f"DeepSpeed could not load {folder}")
        if scaler is not None:  # it has taken the checkpoint's settings in place of the JSON's
            zero = self.shards.zero
            zero.clip_grad = self.max_grad_norm
            saved, zero.loss_scaler, zero.dynamic_loss_scale = zero.loss_scaler, scaler, scaler.dynamic
            self.restore_loss_scaler({"loss_scaler": saved})

    def restore_counters(self, saved: dict) -> None:
        """Counters and schedule from the engine's model file of another layout."""
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self.engine, name, saved[name])
        if self.engine.lr_scheduler is not None and saved["lr_scheduler"] is not None:
            self.engine.lr_scheduler.load_state_dict(saved["lr_scheduler"])

    def restore_loss_scaler(self, saved: dict) -> None:
        """The dynamic loss scale of an fp16 run, and how often it has overflowed; window, hysteresis and lowest scale
        are the JSON's. A run that was not in fp16, and a scale that the JSON fixes, have none."""
        old, zero = saved.get("loss_scaler"), self.engine.optimizer
        if self.engine.fp16_enabled() and isinstance(old, DynamicLossScaler) and zero.loss_scaler.dynamic:
            for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
                setattr(zero.loss_scaler, name, getattr(old, name))

    def resume_schedule(self) -> None:
        """The rate of the next step, from the JSON's schedule as it is now and the position in the checkpoint."""
        scheduler = self.engine.lr_scheduler
        if scheduler is not None:
            scheduler.step(scheduler.last_batch_iteration)
