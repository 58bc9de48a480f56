"""Muon for matrices that ZeRO has cut into pieces: whole ones are put together for the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

# By Jordan et al. (2024); five steps bring singular values between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Numbers of whole matrices that are put together at a time.
BUCKET_SIZE = 1 << 24


def hidden_matrices(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that Muon is for: matrices from hidden state to hidden state."""
    return [p for p in params if getattr(p, "hidden_matrix", False)]


class Place(NamedTuple):
    """The part of a matrix that lies in one of the tensors which ZeRO gives the optimiser."""

    shape: tuple[int, ...]  # of the whole matrix, two numbers
    start: int  # of the part in the whole, both flattened
    offset: int  # of the part in the tensor
    length: int  # 0: no part of it lies there


class Muon(torch.optim.AdamW):
    """Muon for the matrices of parameter groups that are `orthogonal`, AdamW for all others.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): the step is the orthogonal matrix
    next to the momentum's; as large as AdamW's (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2),
    so that both share a learning rate and weight decay. The momentum, Nesterov's, is the state `exp_avg`.

    `locate` names the matrices that a tensor holds parts of, in the same order on every rank; None: a tensor is one
    matrix. A matrix is then put together from the parts of all ranks and made orthogonal where a part of it lies, so
    that the result does not depend on how it was cut up.
    """

    def __init__(self, params, *, momentum: float = 0.95, **settings):
        super().__init__(params, **settings)
        self.momentum = momentum
        self.locate: Callable[[Tensor], list[Place]] | None = None

    @torch.no_grad()
    def step(self, closure=None):
        groups = [group for group in self.param_groups if group["orthogonal"]]
        tensors = [group["params"] for group in groups]
        for group in groups:
            group["params"] = []
        try:
            loss = super().step(closure)
        finally:
            for group, params in zip(groups, tensors, strict=True):
                group["params"] = params
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_matrices(p, p.grad, group["lr"], group["weight_decay"])
        return loss

    def _step_matrices(self, p: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"], state["exp_avg"] = torch.zeros((), device=p.device), torch.zeros_like(p)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(grad, 1 - self.momentum)
        direction = grad.lerp(momentum, self.momentum).flatten()
        p.mul_(1 - lr * weight_decay)
        places = [Place(tuple(p.shape), 0, 0, p.numel())] if self.locate is None else self.locate(p)
        for place, matrix in self._whole(direction, places):
            if place.length:
                update = 0.2 * math.sqrt(max(place.shape)) * orthogonalized(matrix.view(place.shape))
                part = update.flatten()[place.start :][: place.length]
                p.view(-1)[place.offset :][: place.length].sub_(part, alpha=lr)

    def _whole(self, direction: Tensor, places: list[Place]) -> Iterator[tuple[Place, Tensor]]:
        """The matrices of which `direction`, a flat tensor, holds parts, flattened. Collective if cut up."""
        if self.locate is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            for place in places:
                yield place, direction[place.offset :][: place.length]
            return
        for bucket in _buckets(places):
            sizes = [math.prod(place.shape) for place in bucket]
            buffer = direction.new_zeros(sum(sizes))
            wholes = buffer.split(sizes)
            for place, whole in zip(bucket, wholes, strict=True):
                whole[place.start :][: place.length] = direction[place.offset :][: place.length]
            torch.distributed.all_reduce(buffer)  # the others have zeros there
            yield from zip(bucket, wholes, strict=True)


def _buckets(places: list[Place]) -> Iterator[list[Place]]:
    """Consecutive places, BUCKET_SIZE numbers at a time (but at least a matrix)."""
    bucket: list[Place] = []
    size = 0
    for place in places:
        if bucket and size + math.prod(place.shape) > BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
        bucket.append(place)
        size += math.prod(place.shape)
    if bucket:
        yield bucket


def orthogonalized(matrix: Tensor) -> Tensor:
    """Close to the nearest matrix with orthogonal rows (or columns, whichever are fewer): float32, the same shape.

    Newton-Schulz's iteration X <- (a + b XX' + c (XX')^2) X, all steps of which are taken on XX' alone: they are
    products of the shorter side. In float32 everywhere, because half precision would turn differences of rounding, as
    other numbers of ranks bring them, into differences of the result.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.float()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    gram, total = x @ x.T, None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        total = factor if total is None else factor @ total
        if step + 1 < NEWTON_SCHULZ_STEPS:
            gram = factor @ gram @ factor
    x = total @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
