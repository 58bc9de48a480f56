"""What a run leaves behind to look at: metrics.jsonl, and TensorBoard through the engine's own monitor.

Rank 0 writes; on other ranks every call does nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ds_tokimg.settings.files import write_text
from ds_tokimg.training.logfiles import LogFiles, guard_events, replace_end

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import TrainEngine


METRICS = "metrics.jsonl"


class Tracker:
    """Appends to the run's metrics and TensorBoard log.

    Args:
        resumed_step: the optimiser step the run continues from, 0 for a new run. Rows of later steps, and a last line
            that was cut off, are dropped from metrics.jsonl; TensorBoard is told to forget them.
    """

    def __init__(self, output_dir: str | Path, engine: TrainEngine, resumed_step: int = 0):
        self.path = Path(output_dir) / METRICS
        self.active = engine.dist.rank == 0
        self.rows, self.monitors = LogFiles(METRICS), LogFiles("the monitors")
        self.monitor = engine.engine.monitor
        # DeepSpeed would write the learning rate against samples, and wait for the disk, at every step.
        self.monitor.enabled = False
        tensorboard = self.monitor.tb_monitor
        self.writer = tensorboard.summary_writer if self.active and tensorboard is not None else None
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _keep_rows(self.path, resumed_step)
        if self.writer is not None:
            guard_events(self.writer)
            _forget_events(self.writer, resumed_step + 1)

    def go_back(self, step: int) -> None:
        """Drop what was written of later steps, as a run that is resumed does."""
        if self.active:
            with self.rows.guarded():
                _keep_rows(self.path, step)
        if self.writer is not None:
            _forget_events(self.writer, step + 1)

    def log(self, row: dict) -> None:
        """Append one row of metrics, which has a `step`, and its numbers as TensorBoard scalars.

        A value may be a dict of numbers (say, accuracy per noise level). Infinite and NaN become null.
        """
        if not self.active:
            return
        with self.rows.guarded(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._show(row)

    def complete(self, step: int, more: dict) -> None:
        """Add what was measured later to the last row, if that is of this step; else a row of its own."""
        if not self.active:
            return
        with self.rows.guarded():
            rows = self.path.read_bytes() if self.path.exists() else b""
            start = rows.rfind(b"\n", 0, len(rows) - 1) + 1
            row = json.loads(rows[start:]) if rows else {}
            if row.get("step") != step:
                row, start = {"step": step}, len(rows)
            new = json.dumps(row | _finite(more), allow_nan=False).encode() + b"\n"
            replace_end(self.path, start, rows[start:], new)
        self._show({"step": step, **more})

    def _show(self, row: dict) -> None:
        events = [(name, value, row["step"]) for name, value in _scalars(row)]
        with self.monitors.guarded():
            self.monitor.write_events(events)

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Images [n, 3, H, W] in [0, 1], side by side."""
        if self.writer is not None:
            self.writer.add_images(name, images, step)
            self.writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """A text, shown as Markdown."""
        if self.writer is not None:
            self.writer.add_text(name, text, step)
            self.writer.flush()

    def close(self) -> None:
        """Write out what is pending."""
        if self.writer is not None:
            self.writer.close()


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


def _scalars(row: dict) -> list[tuple[str, float]]:
    """(TensorBoard tag, number) pairs: `train/loss`, `validation/val_loss`, `validation/val_accuracy/0.5`."""
    scalars = []
    for name, value in row.items():
        tag = f"validation/{name}" if name.startswith("val_") else f"train/{name}"
        items = [(f"{tag}/{key}", item) for key, item in value.items()] if isinstance(value, dict) else [(tag, value)]
        scalars += [(tag, float(item)) for tag, item in items if isinstance(item, int | float) and name != "step"]
    return scalars
