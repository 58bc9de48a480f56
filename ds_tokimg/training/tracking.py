"""What a run leaves behind to look at: metrics.jsonl, the engine's monitors (TensorBoard, CSV, W&B, Comet), a folder of
samples.

Rank 0 writes; on other ranks every call does nothing. What is written, and under which names, is in `dashboard`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ds_tokimg.engine.checkpoint import tag_of
from ds_tokimg.settings.files import write_text
from ds_tokimg.training.dashboard import scalars
from ds_tokimg.training.logfiles import LogFiles, guard_events, replace_end

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import StepResult, TrainEngine


METRICS, SAMPLES = "metrics.jsonl", "samples"


class Tracker:
    """Appends to the run's metrics and to what the engine's monitors show.

    Args:
        resumed_step: the optimiser step the run continues from, 0 for a new run. Rows of later steps, and a last line
            that was cut off, are dropped from metrics.jsonl; TensorBoard is told to forget them.
        tags: of metrics whose name in the monitors is another than theirs, see `dashboard.scalars`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        engine: TrainEngine,
        resumed_step: int = 0,
        tags: Mapping[str, str] | None = None,
    ):
        self.folder = Path(output_dir)
        self.path = self.folder / METRICS
        self.active = engine.dist.rank == 0
        self.tags = tags or {}
        self.rows, self.monitors, self.samples = LogFiles(METRICS), LogFiles("the monitors"), LogFiles(SAMPLES)
        self.monitor = engine.engine.monitor
        # DeepSpeed would write the learning rate against samples, and wait for the disk, at every step.
        self.monitor.enabled = False
        tensorboard = self.monitor.tb_monitor
        self.writer = tensorboard.summary_writer if self.active and tensorboard is not None else None
        if self.active:
            self._begin(resumed_step)

    def _begin(self, resumed_step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _keep_rows(self.path, resumed_step)
        if self.writer is not None:
            guard_events(self.writer)
            _forget_events(self.writer, resumed_step + 1)

    def go_back(self, step: int) -> None:
        """Drop what was written of later steps, as a run that is resumed does."""
        self._write(self.rows, lambda: _keep_rows(self.path, step))
        if self.writer is not None:
            _forget_events(self.writer, step + 1)

    def _write(self, files: LogFiles, write: Callable[[], object], path: Path | None = None) -> None:
        """Everything that is written while the run trains: what fails is no failure of the run."""
        if self.active:
            with files.guarded(path):
                write()

    def log(self, row: dict) -> None:
        """Append one row of metrics, which has a `step`, and its numbers as scalars.

        A value may be a dict of numbers (say, accuracy per noise level). Infinite and NaN become null.
        """
        self._write(self.rows, partial(self._append, row), self.path)
        self._write(self.monitors, partial(self._show, row))

    def complete(self, step: int, more: dict) -> None:
        """Add what was measured later to the last row, if that is of this step; else a row of its own."""
        self._write(self.rows, partial(self._add_to_last, step, more))
        self._write(self.monitors, partial(self._show, {"step": step, **more}))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """A picture of a step: a PNG among the run's samples, and an image in TensorBoard and W&B."""
        self._write(self.samples, lambda: image.save(self._place(step) / f"{name}.png"))
        self._on_tensorboard("add_image", f"{SAMPLES}/{name}", np.asarray(image), step, dataformats="HWC")
        if self.monitor.wandb_monitor is not None:
            import wandb

            shown = {f"{SAMPLES}/{name}": wandb.Image(image)}
            self._write(self.monitors, partial(self.monitor.wandb_monitor.log, shown, step=step))

    def text(self, name: str, text: str, step: int, markdown: str) -> None:
        """A text of a step: a file among the run's samples, and, as Markdown, a text in TensorBoard."""
        self._write(self.samples, lambda: (self._place(step) / f"{name}.txt").write_text(text, encoding="utf-8"))
        self._on_tensorboard("add_text", f"{SAMPLES}/{name}", markdown, step)

    def describe(self, texts: Mapping[str, str], summaries: list) -> None:
        """What belongs to the run as a whole, in TensorBoard alone: texts (Markdown) by name, and its own messages, as
        those of the tab HParams."""
        for name, markdown in texts.items():
            self._on_tensorboard("add_text", name, markdown, 0)
        for summary in summaries:
            self._on_tensorboard("add_summary", summary)

    def close(self, *summaries) -> None:
        """Write out what is pending, after the last messages of the run."""
        self.describe({}, list(summaries))
        if self.writer is not None:
            self._write(self.monitors, self.writer.close)
        if self.monitor.wandb_monitor is not None:
            import wandb

            self._write(self.monitors, wandb.finish)

    def last_row(self) -> dict:
        """The last row of metrics, {} where there is none; of an earlier launch where this one has logged nothing."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.active and self.path.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    def _on_tensorboard(self, method: str, *values: Any, **more: Any) -> None:
        """`method` of the writer, or of the file that it writes to; on the disk at once."""
        if self.writer is not None:
            owner = self.writer if hasattr(self.writer, method) else self.writer.file_writer
            self._write(self.monitors, partial(getattr(owner, method), *values, **more))
            self._write(self.monitors, self.writer.flush)

    def _append(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def _add_to_last(self, step: int, more: dict) -> None:
        rows = self.path.read_bytes() if self.path.exists() else b""
        start = rows.rfind(b"\n", 0, len(rows) - 1) + 1
        row = json.loads(rows[start:]) if rows else {}
        if row.get("step") != step:
            row, start = {"step": step}, len(rows)
        new = json.dumps(row | _finite(more), allow_nan=False).encode() + b"\n"
        replace_end(self.path, start, rows[start:], new)

    def _show(self, row: dict) -> None:
        self.monitor.write_events([(tag, value, row["step"]) for tag, value in scalars(row, self.tags)])

    def _place(self, step: int) -> Path:
        place = self.folder / SAMPLES / tag_of(step)
        place.mkdir(parents=True, exist_ok=True)
        return place


class Meter:
    """How many tokens have been trained on, earlier launches included.

    Args:
        row: the last one of metrics that is kept. Steps after it count as many tokens as its own; there are none where
            the checkpoint is of a step that was logged.
        first_step: that the run goes on from.
    """

    def __init__(self, row: dict, first_step: int):
        step, own = row.get("step", 0), row.get("valid_tokens", 0)
        self._tokens = row.get("tokens_seen", step * own) + max(0, first_step - step) * own
        self._results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """A step. Its sums stay where they are: no accelerator is waited for."""
        self._results.append(result)

    def tokens_seen(self) -> int:
        self._tokens += sum(int(result.sums["valid_tokens"]) for result in self._results)
        self._results = []
        return self._tokens


def _keep_rows(path: Path, last_step: int) -> None:
    """Keep the rows up to `last_step`; the file is replaced in one go."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
    write_text(path, "".join(line + "\n" for line in kept), end="")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off while it was written


def _forget_events(writer, step: int) -> None:
    """TensorBoard ignores what an earlier process wrote for `step` and later once it meets a start event there."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.file_writer.add_event(Event(step=step, file_version="brain.Event:2"))
    writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
