"""Whether the numbers of a run are sane: what is skipped, what is kept, and when a run goes back or gives up.

Everything is decided from losses and gradient norms of whole train batches, which all ranks share, so all decide the
same; and the history that it is decided from is part of a checkpoint, so a run that goes on decides the same too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ds_tokimg.engine import checkpoint as checkpoints
from ds_tokimg.engine.saving import CannotWrite
from ds_tokimg.engine.skipping import LOSS_SCALE, NOT_FINITE, REFUSED
from ds_tokimg.errors import TrainingError

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import StepResult
    from ds_tokimg.engine.ranks import Dist
    from ds_tokimg.settings.config import TrainConfig

# How many steps in a row may be skipped. Dynamic loss scaling skips about one step per halving of the scale at the
# start of an fp16 run, so those get more patience.
MAX_SKIPPED_IN_A_ROW = 5
MAX_SKIPPED_IN_A_ROW_FP16 = 40
MAX_TIMES_BACK = 3  # to one and the same checkpoint
FIRST_STEPS = 10  # their median loss is what the run began with
RECENT_STEPS = 20  # their median loss is what the run has come to
HISTORY_STEPS = 64  # whose medians a spike is compared with, and ...
LEAST_HISTORY = 16  # ... how many of them it takes to know what is usual
SANE = 2.0  # times the loss that the run began with: up to this a checkpoint is worth going on from
DIVERGED = 10.0  # times that loss: from this on the run is lost
MAX_SHOWN = 16  # training images that are named in a line


class Health:
    """The recent losses and gradient norms of a run, and what follows from them.

    Args:
        config: its `skip_spikes` and `go_back_after`.
        state: of the checkpoint that the run goes on from, `Health.state` of then; empty for a new run.
    """

    def __init__(self, config: TrainConfig, state: dict):
        self.config = config
        self.in_a_row = 0  # steps skipped, but for fp16's loss scale
        self.in_a_row_fp16 = 0
        self.owes_save = False  # one that was due at a step that was skipped
        self.told_diverged = False
        self.back_to: int | None = None  # the step that the run has last gone back to, and how often
        self.times_back = 0
        self.restore(state)

    def restore(self, state: dict) -> None:
        """The history of a checkpoint."""
        self.first: list[float] = list(state.get("first", ()))
        self.losses: list[float] = list(state.get("losses", ()))
        self.norms: list[float] = list(state.get("norms", ()))
        self.batches_left_out: int = state.get("batches_left_out", 0)

    def state(self) -> dict:
        """JSON values, finite all of them."""
        history = {"first": self.first, "losses": self.losses, "norms": self.norms}
        return {**history, "batches_left_out": self.batches_left_out}

    @property
    def guard(self) -> Callable[[float, float], bool] | None:
        """Which steps the engine is to skip besides those that are not finite; None: no others."""
        return self._is_spike if self.config.skip_spikes else None

    def _is_spike(self, loss: float, norm: float) -> bool:
        """Whether the loss or the gradient norm is more than `skip_spikes` times its recent median."""
        factor = self.config.skip_spikes
        if len(self.losses) < LEAST_HISTORY:
            return False
        pairs = ((loss, median(self.losses)), (norm, median(self.norms)))
        return any(value > factor * usual > 0 for value, usual in pairs)

    def add(self, result: StepResult) -> None:
        """Take a step into the history, or count it as skipped."""
        if not result.skipped:
            self.in_a_row = self.in_a_row_fp16 = 0
            self.first = [*self.first, result.loss][:FIRST_STEPS]
            self.losses = [*self.losses, result.loss][-HISTORY_STEPS:]
            self.norms = [*self.norms, result.grad_norm][-HISTORY_STEPS:]
        elif result.skipped == LOSS_SCALE:
            self.in_a_row_fp16 += 1
        else:
            self.in_a_row += 1

    @property
    def rise(self) -> float:
        """The recent loss, in times of the one that the run began with; 0 before the first step."""
        began = median(self.first) if self.first else 0.0
        return median(self.losses[-RECENT_STEPS:]) / began if began > 0 else 0.0

    @property
    def is_sane(self) -> bool:
        """Whether a checkpoint of now is worth going on from."""
        return self.rise <= SANE

    def postpones(self, result: StepResult) -> bool:
        """Whether a save that is due is to wait for the next step that is taken."""
        self.owes_save = result.skipped in (NOT_FINITE, REFUSED)
        return self.owes_save

    def goes_back(self) -> bool:
        """Whether it is time to go back to the last good checkpoint."""
        return 0 < self.config.go_back_after <= self.in_a_row

    def went_back(self, step: int, state: dict, left: int) -> None:
        """The run is at `step` again, the one of a checkpoint with this `state`, and takes the data from where it was:
        after step `left`. TrainingError when that has not helped before."""
        self.times_back = self.times_back + 1 if step == self.back_to else 1
        self.back_to, self.in_a_row, self.owes_save = step, 0, False
        if self.times_back > MAX_TIMES_BACK:
            raise TrainingError(
                f"the run has gone back to step {step} {MAX_TIMES_BACK} times, each time with other data, and its "
                f"numbers went bad again. {ADVICE}"
            )
        left_out = self.batches_left_out + left - step
        self.restore(state)
        self.batches_left_out = left_out

    def check_patience(self, result: StepResult, output_dir: str) -> None:
        """TrainingError on all ranks together after too many skipped steps in a row."""
        count = self.in_a_row + self.in_a_row_fp16
        limit = MAX_SKIPPED_IN_A_ROW_FP16 if self.in_a_row_fp16 else MAX_SKIPPED_IN_A_ROW
        if count >= max(limit, self.config.go_back_after):
            raise TrainingError(
                f"{count} steps in a row were skipped, up to step {result.step}, whose loss is {result.loss:g}: "
                f"{_reason(result)}. {ADVICE} {where_to_go_on(output_dir)}"
            )

    def divergence(self, output_dir: str) -> str | None:
        """What is to be said, once, of a run that is lost."""
        if self.told_diverged or len(self.losses) < RECENT_STEPS or self.rise < DIVERGED:
            return None
        self.told_diverged = True
        return (
            f"the run has diverged: the loss of the last {RECENT_STEPS} steps is {self.rise:,.0f} times what it began "
            f"with. It will hardly recover: end it. {ADVICE} {where_to_go_on(output_dir)}"
        )

    def note(self, step: int, output_dir: str) -> str | None:
        """What the user of a run that goes on from a checkpoint of `step` should know."""
        if not step or self.is_sane:
            return None
        return (
            f"the checkpoint of step {step} has a loss {self.rise:,.0f} times what the run began with. "
            f"{where_to_go_on(output_dir)}"
        )


ADVICE = "Lower the learning rate (--lr), clip gradients harder (--max_grad_norm), or look at the texts."


def where_to_go_on(output_dir: str) -> str:
    """The newest checkpoint with a sane loss, in words."""
    sane = checkpoints.newest_sane(output_dir)
    if sane is None:
        return "There is no checkpoint with a sane loss: start again."
    return f"The newest checkpoint with a sane loss: --resume {sane}"


def describe_skip(result: StepResult, samples: list[int]) -> str:
    """A line for the log: why a step was skipped, and of which training images its batch was."""
    shown = ", ".join(map(str, samples[:MAX_SHOWN])) + (", ..." if len(samples) > MAX_SHOWN else "")
    return f"step {result.step} is skipped: {_reason(result)}; training images {shown}"


def _reason(result: StepResult) -> str:
    if result.skipped == REFUSED:
        return f"a spike (loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g})"
    what = "its gradients are" if math.isfinite(result.loss) else "its loss is"
    return f"{what} not finite"


def check_folder(output_dir: str, dist: Dist) -> None:
    """CannotWrite on all ranks where the run's folder was deleted: a checkpoint without its settings is none."""
    folder = Path(output_dir)
    if not dist.broadcast((folder / "config.json").is_file()):
        raise CannotWrite(f"{folder} is gone (deleted or moved while the run was writing into it)")
