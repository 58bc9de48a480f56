"""What a run says, and its clocks: how fast it is, and how long what is left will take."""

from __future__ import annotations

import contextlib
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from ds_tokimg import console
from ds_tokimg.engine.engine import StepResult
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.training.assemble import Parts
from ds_tokimg.training.bound import Bound
from ds_tokimg.training.ngram import Figure

CONFIDENCE = 1.96  # standard errors on either side that hold 95 %


def timed(what: str) -> Callable:
    """A method of the run whose time is taken and shown: "save", shown as "saving"."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(run: Any, *args: Any, **options: Any) -> Any:
            with run.report.watch.taking(what), console.Work(f"{what.removesuffix('e')}ing"):
                return method(run, *args, **options)

        return wrapper

    return decorate


class Report:
    """The lines of a run on stdout, and its bar on a terminal. Rank 0 speaks.

    Args:
        listens: whether this is rank 0.
        verbose: lines with every figure of a step in place of those that fit 80 columns.
        steps: the step that the launch begins after, and its last one.
        ahead: what lies between a step and the last one, in the units of `Stopwatch`.
    """

    def __init__(self, listens: bool, verbose: bool, steps: tuple[int, int], ahead: Callable[[int], dict[str, float]]):
        self.listens, self.verbose, self.ahead = listens, verbose, ahead
        self.last_step = steps[1]
        self.watch = Stopwatch()
        self.progress = console.Work("training" if listens else "", steps[1])
        self.progress.done = steps[0]

    def say(self, line: str) -> None:
        """The run goes on when nobody listens any more (the launcher has ended, the terminal is closed)."""
        if self.listens:
            console.say(line)

    def begin(self, config: TrainConfig, decided: list[str], notes: list[str], resumed: Path | None) -> None:
        """`decided`: what was left open and is now known; `notes`: what the run's user should know."""
        if decided:
            self.say(wrapped(f"automatic: {', '.join(decided)}"))
        for note in notes:
            self.say(f"note: {note}")
        if resumed:
            self.say(f"resumed {resumed} at step {self.progress.done}")
        elif config.resume == "auto":
            self.say(f"no checkpoint in {config.output_dir} yet: a new run")

    def describe(self, parts: Parts, model: str, engine: str) -> None:
        """What the run is: `model` and `engine` in a few words."""
        module = parts.module
        size = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters())
        self.say(
            wrapped(f"{model}: {size / 1e6:.2f} M parameters; {parts.layout.codec}")
            + "\n"
            + wrapped(
                f"{len(parts.train_set):,} training images with {parts.train_set.num_tokens:,} tokens, "
                f"{len(parts.eval_set):,} validation images with {parts.eval_set.num_tokens:,}; "
                f"unigram entropy {parts.unigram_entropy:.3f} bits per token"
            )
            + "\n"
            + wrapped(engine)
        )
        if module.told != module.model.writing:
            self.say("bits/token are told by validations, which draw in turn; a step does not")

    def step(self, row: dict) -> None:
        """A line of `metrics.jsonl` as one for people."""
        self.say(step_line(row, self.last_step, self.time_left(row["step"]), self.verbose))

    def passed(self, step: int) -> None:
        """A step is done."""
        self.progress.advance()
        self.progress.left = self.time_left(step)

    def time_left(self, step: int) -> str:
        return console.clock(self.watch.seconds(self.ahead(step)))

    def validation(self, bound: Bound) -> None:
        self.say(
            f"validation: bits/token {bound.bits_per_token:.4f}{error_of(bound)}  "
            f"{'' if bound.loses_text else f'bits/byte {bound.bits_per_byte:.4f}  '}loss {bound.loss:.4f}"
        )

    def end(
        self, bound: Bound | None, unigram_entropy: float, counted: Figure | None, commands: dict[str, str]
    ) -> None:
        """The last validation beside what counting reaches (`counted`), and the commands to go on with."""
        if bound is not None:
            error = f",{error_of(bound)}" if error_of(bound) else ""
            per_byte = "" if bound.loses_text else f", {bound.bits_per_byte:.4f} bits per byte"
            told = f"validation: {bound.bits_per_token:.4f} bits per token (unigram entropy {unigram_entropy:.4f})"
            self.say("\n" + wrapped(f"{told}{error}{per_byte}"))
        if counted is not None:
            self.say(wrapped(f"beside it, counting alone: {counted} bits per token"))
        for what, command in commands.items():
            self.say(f"{what + ':':<14}{command}")


def wrapped(words: str) -> str:
    """In lines of at most 80 columns, all but the first of them indented. Paths and names stay whole."""
    return textwrap.fill(words, console.WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def step_line(row: dict, last_step: int, left: str, verbose: bool = False) -> str:
    """A step in at most 80 columns; in more with all figures."""
    words = [f"step {row['step']}/{last_step}", f"loss {_short(row['loss'])}"]
    if "bits_per_token" in row:
        words.append(f"bits/token {row['bits_per_token']:.2f}")
    if verbose:
        words.insert(1, f"epoch {row['epoch'] + 1}")
        words += [f"lr {row['lr']:.2e}", f"grad norm {row['grad_norm']:.2f}"]
    rate = row["valid_tokens_per_second"]
    words.append(f"{rate:,.0f} tokens/s" if rate < 1e5 else f"{rate / 1e3:,.0f}k tokens/s")
    if verbose:
        speed, share = row["model_flops_per_second"] / 1e9, row["peak_share"]
        words += [f"{speed:,.0f} GFLOP/s ({share:.0%} of peak)", f"{row['data_wait']:.0%} waiting for data"]
        words += [f"{row['padding_fraction']:.0%} padding", f"{row['step_seconds']:.3g} s a step"]
    words.append(f"{left} left")
    line = "  ".join(words)
    return line if verbose or len(line) <= console.WIDTH else " ".join(words)


def _short(value: float) -> str:
    return f"{value:.4f}" if not value >= 1e4 else f"{value:.2e}"


def error_of(bound: Bound) -> str:
    """The interval that holds 95 % of such samples of texts: " ± 0.08 (95 %)"; nothing of a single text."""
    error = CONFIDENCE * bound.standard_error
    return "" if math.isnan(error) else f" ± {error:.4f} (95 %)"


# ---- clocks ----


def times_due(step: int, last_step: int, interval: int) -> int:
    """How often something is done after a step that is done at every so many steps and at the last one."""
    return (last_step - 1) // interval - step // interval + 1 if step < last_step else 0


class Stopwatch:
    """Seconds that things have taken so far, each by its amount: a "step", a "validated" token, a "save"."""

    def __init__(self) -> None:
        self._amounts: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def add(self, what: str, seconds: float, amount: float = 1) -> None:
        self._amounts[what] = self._amounts.get(what, 0) + amount
        self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    @contextlib.contextmanager
    def taking(self, what: str, amount: float = 1) -> Iterator[None]:
        """Within: so much of it is done."""
        begun = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - begun, amount)

    def seconds(self, amounts: dict[str, float]) -> float:
        """What these amounts will take; nothing is known of what has not happened yet."""
        known = {what: amount for what, amount in amounts.items() if self._amounts.get(what)}
        return sum(amount * self._seconds[what] / self._amounts[what] for what, amount in known.items())


@dataclass
class Pace:
    """What was done in `steps` steps that took `seconds`, `waited` of them for data: sums over all ranks."""

    steps: int
    seconds: float
    waited: float
    valid_tokens: float
    flops: float


class Speedometer:
    """What was done since the last reading."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.restart()

    def add(self, result: StepResult, wait_seconds: float) -> None:
        """A step. Its sums stay where they are: no accelerator is waited for."""
        self.results.append(result)
        self.waited += wait_seconds

    def read(self) -> Pace:
        """Of the steps since the last reading, at least one."""
        sums = [result.sums for result in self.results]
        tokens, flops = (sum(values[name] for values in sums) for name in ("valid_tokens", "flops"))
        seconds = time.perf_counter() - self.begun
        pace = Pace(len(sums), seconds, self.waited, tokens, flops)
        self.watch.add("step", seconds, pace.steps)
        self.restart()
        return pace

    def restart(self) -> None:
        """Leaves what happened since the last reading (a validation, say) out of the next."""
        self.results: list[StepResult] = []
        self.waited, self.begun = 0.0, time.perf_counter()
