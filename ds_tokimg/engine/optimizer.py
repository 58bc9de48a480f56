"""The optimiser: torch's fused kernels, with a moving average of the weights as one more state beside the moments.

An average that is optimiser state is cut up, moved and saved by ZeRO exactly as the moments are: no rank holds a full
copy of it, and it advances on those steps alone that the optimiser really takes. Neither deepspeed nor a compiler is
needed here: on a CPU torch's fused AdamW is four times as fast as its other loops.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ds_tokimg.engine.muon import Muon, hidden_matrices

AVERAGE_PREFIX = "ema_"
UPDATES = "updates"  # optimiser state: how many updates this parameter has had, a Python int
OPTIMIZERS = ("AdamW", "Adam", "SGD", "Muon")

# Keys of the JSON's optimizer.params that choose among DeepSpeed's own kernels, which are not used.
_KERNEL_CHOICES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")


def average_key(decay: float) -> str:
    """The name of the average in the optimiser's state, and of its file: `ema_0.9999`."""
    return f"{AVERAGE_PREFIX}{decay}"


def warmed_decay(decay: float, updates: int) -> float:
    """The decay after `updates` updates. Short at first, so that the average forgets the random weights it began with
    (the schedule of TensorFlow's ExponentialMovingAverage): min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + updates) / (10 + updates))


class Averaging(torch.optim.Optimizer):
    """Mix-in before a torch optimiser: `ema_DECAY` and `updates` in the state of each parameter.

    DeepSpeed reads `overflow` and `_global_grad_norm` of whatever optimiser it steps. At stage 0 nothing else sets
    them, so the engine does, and a step on gradients that are not finite counts as skipped there too.
    """

    def __init__(self, params, *, ema_decay: float = 0.0, **settings):
        super().__init__(params, **settings)
        self.ema_decay = ema_decay
        self.average = average_key(ema_decay) if ema_decay else None  # its key in the states; None: none is kept
        self.overflow = False
        self._global_grad_norm: Tensor | None = None

    def keeps(self, group: dict, key: str) -> bool:
        """Whether the state of the parameters in a group has an entry `key`."""
        return True

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # torch fills a state that is empty, so the starting points are added after its step.
        new = [p for p in params if self.average and self.average not in self.state[p]]
        starts = {p: p.detach().clone() for p in new}
        loss = super().step(closure)
        for p, start in starts.items():
            self.state[p][self.average] = start
        self._advance(params)
        return loss

    def _advance(self, params: list[Tensor]) -> None:
        by_updates: dict[int, list[Tensor]] = {}
        for p in params:
            updates = self.state[p].get(UPDATES, 0)
            self.state[p][UPDATES] = updates + 1
            by_updates.setdefault(updates, []).append(p)
        for updates, group in by_updates.items() if self.average else ():
            averages = [self.state[p][self.average] for p in group]
            torch._foreach_lerp_(averages, group, 1 - warmed_decay(self.ema_decay, updates))

    def load_state_dict(self, state_dict: dict) -> None:
        """Load states, not settings: those are the JSON's, which may have changed since. An average that is no
        longer asked for is dropped; a new one starts from the weights at the next step."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, settings, strict=True):
            group.update(own)
        for state in self.state.values():
            for key in [k for k in state if k.startswith(AVERAGE_PREFIX) and k != self.average]:
                del state[key]


class AveragedAdamW(Averaging, torch.optim.AdamW):
    """torch.optim.AdamW with a moving average of the weights in its state."""


class AveragedAdam(Averaging, torch.optim.Adam):
    """torch.optim.Adam with a moving average of the weights in its state."""


class AveragedSGD(Averaging, torch.optim.SGD):
    """torch.optim.SGD with a moving average of the weights in its state."""


class AveragedMuon(Averaging, Muon):
    """Muon and AdamW with a moving average of the weights in their state."""

    def keeps(self, group: dict, key: str) -> bool:
        return not (group["orthogonal"] and key == "exp_avg_sq")


def build_optimizer(params: Iterable[nn.Parameter], block: dict, ema_decay: float = 0.0) -> Averaging:
    """The optimiser of a run.

    Args:
        params: the trainable parameters, whole (before ZeRO cuts them up).
        block: `optimizer` of the DeepSpeed JSON, {"type": ..., "params": {...}} with DeepSpeed's meaning: "Adam" is
            AdamW unless its params say `"adam_w_mode": false`; "Muon" is for parameters that a layer has marked as
            `hidden_matrix`, and AdamW, with the same params, for the others.
        ema_decay: decay of the weights' moving average, in (0, 1); 0: none is kept.

    Weight decay is for matrices only: gains and biases (fewer than two dimensions) go without.
    Raises ValueError for an optimiser that is not one of `OPTIMIZERS`, or for Muon where nothing is marked.
    """
    settings = dict(block.get("params", {}))
    kind = {name.lower(): name for name in OPTIMIZERS}.get(str(block["type"]).lower())
    if kind is None:
        raise ValueError(f"unknown optimizer {block['type']!r}; available: {', '.join(OPTIMIZERS)}")
    if kind == "Adam" and settings.get("adam_w_mode", True):
        kind = "AdamW"
    for key in _KERNEL_CHOICES:
        settings.pop(key, None)
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    classes = {"AdamW": AveragedAdamW, "Adam": AveragedAdam, "SGD": AveragedSGD, "Muon": AveragedMuon}
    settings.setdefault("weight_decay", 0.01 if kind in ("AdamW", "Muon") else 0.0)
    params = list(params)
    matrices = hidden_matrices(params) if kind == "Muon" else []
    if kind == "Muon" and not matrices:
        raise ValueError("optimizer Muon is for the matrices of hidden layers, and no parameter is marked as one")
    others = [p for p in params if all(p is not matrix for matrix in matrices)]
    groups = _decay_groups(others, settings["weight_decay"])
    if matrices:
        groups = [group | {"orthogonal": False} for group in groups]
        groups.append({"params": matrices, "orthogonal": True})
    return classes[kind](groups, ema_decay=ema_decay, fused=True, **settings)


def _decay_groups(params: list[nn.Parameter], weight_decay: float) -> list[dict]:
    """One group, or two where weight decay must spare vectors: each group costs ZeRO a flat buffer of its own."""
    matrices = [p for p in params if p.ndim >= 2]
    vectors = [p for p in params if p.ndim < 2]
    if weight_decay == 0 or not matrices or not vectors:
        return [{"params": params, "weight_decay": weight_decay if matrices else 0.0}]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
