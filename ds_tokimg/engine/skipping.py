"""Steps that change nothing: why they were skipped, and how DeepSpeed is told to throw gradients away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Why a step was skipped.
NOT_FINITE = "not finite"  # the loss, or a gradient
LOSS_SCALE = "loss scale"  # fp16: the scaled gradients overflowed, as they now and then do; the scale has been halved
REFUSED = "refused"  # by whoever called `TrainEngine.train_batch`


@contextlib.contextmanager
def discarding(zero: Any, stage: int) -> Iterator[None]:
    """Within, on all ranks: a step of DeepSpeed's optimiser throws its gradients away and counts as skipped.

    It does so by itself where gradients overflow. Here it is told that they have, and that the loss scale is not why.

    Args:
        zero: DeepSpeed's optimiser; at stage 0 the optimiser itself, whose gradients are dropped.
    """
    if stage == 0:
        for group in zero.param_groups:
            for param in group["params"]:
                param.grad = None
        zero.overflow = True
        yield
        return

    def overflow(*args: object, **options: object) -> bool:
        zero.overflow = True
        return True

    told: dict[str, Any] = {"_update_scale": lambda has_overflow=False: None}
    told |= {"_overflow_check_and_loss_scale_update" if stage == 3 else "check_overflow": overflow}
    checks = stage < 3 and zero.check_grad_overflow
    vars(zero).update(told)
    if stage < 3:
        zero.check_grad_overflow = True
    try:
        yield
    finally:
        for name in told:
            del vars(zero)[name]
        if stage < 3:
            zero.check_grad_overflow = checks
