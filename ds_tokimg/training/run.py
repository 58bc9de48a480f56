"""One run, from its settings to the last checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.command_line import GIVEN_JSON, has_checkpoint
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.files import write_folder
from ds_tokimg.training.lock import Lock, only_writer

if TYPE_CHECKING:
    from ds_tokimg.engine.ranks import Dist
    from ds_tokimg.training.assemble import Parts


def train(config: TrainConfig, raw: dict, dist: Dist) -> None:
    """A whole run. Nothing is written before all settings, data and the model have been found to fit, and nothing where
    another run is writing."""
    config = dist.broadcast(config)  # what it says of the disk, all ranks take from the first
    with only_writer(config.output_dir, dist) as lock:
        _train(config, raw, dist, lock)


def _train(config: TrainConfig, raw: dict, dist: Dist, lock: Lock) -> None:
    from ds_tokimg.engine import checkpoint as checkpoints
    from ds_tokimg.engine.engine import TrainEngine, machine_capabilities
    from ds_tokimg.training import automatic
    from ds_tokimg.training.assemble import assemble, load_start
    from ds_tokimg.training.loop import Run

    resumed = find_resumed(config, dist)
    state = checkpoints.read_state(resumed) if resumed else {}
    train_batch_size = state.get("train_batch_size")
    dist.on_first_rank(lambda: check_output(config, resumed))
    parts = assemble(config, dist, resumed, load_start(config))
    config, decided = automatic.decide(config, raw, len(parts.train_set), dist.world_size, train_batch_size)
    settings, notes = engine_json.resolve(raw, config, machine_capabilities(), parts.steps_per_epoch, train_batch_size)
    config = dataclasses.replace(config, train_batch_size=settings["train_batch_size"])
    notes = [*parts.notes, *notes]
    notes += automatic.short_schedule(config.epochs * parts.steps_per_epoch(config.train_batch_size), config)
    dist.on_first_rank(lock.take)
    dist.on_first_rank(lambda: check_output(config, resumed))  # another run may have been quicker
    dist.on_first_rank(lambda: write_settings(config, raw, settings, parts))
    check_shared(config, dist)
    engine = TrainEngine(parts.module, settings, config.ema_decay, dist)
    if resumed:
        # A conversion writes to this run's folder: the checkpoint may lie where nobody can.
        state = checkpoints.load(engine, resumed, Path(config.output_dir) / checkpoints.FOLDER)
    run = Run(config, settings, parts, engine, state)
    run.introduce(decided, notes, resumed)
    with run.signals:
        run.loop()
        run.finish()


def find_resumed(config: TrainConfig, dist: Dist) -> Path | None:
    """The checkpoint that the run goes on from, the same on all ranks; None for a new run."""
    from ds_tokimg.engine import checkpoint as checkpoints

    if config.resume is None:
        return None
    if config.resume != "auto":
        return checkpoints.find(config.output_dir, config.resume, dist)
    goes_on = dist.on_first_rank(lambda: has_checkpoint(config.output_dir))
    return checkpoints.find(config.output_dir, "latest", dist) if goes_on else None


def check_output(config: TrainConfig, resumed: Path | None) -> None:
    """A run never writes into another's folder. What was killed before its first checkpoint was complete is no run."""
    folder = Path(config.output_dir)
    if not has_checkpoint(folder):
        return
    if resumed is None:
        raise UserError(
            f"--output_dir {folder} already holds a run: go on with it (--resume latest) or choose another folder"
        )
    if resumed.resolve().parent != (folder / "checkpoints").resolve():
        raise UserError(
            f"--output_dir {folder} already holds a run, and {resumed} is not of it: leave --output_dir out to go on "
            "where that checkpoint lies, or choose another folder"
        )


def write_settings(config: TrainConfig, raw: dict, settings: dict, parts: Parts) -> None:
    """config.json, the engine's JSON as given and as resolved, and the tokenizer: what resuming, evaluation and
    generation need. Each is replaced in one go: a run that is killed here is as it was."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.json")
        engine_json.save(raw, folder / GIVEN_JSON)
        engine_json.save(settings, folder / "ds_config.json")
        if not (has_checkpoint(folder) and (folder / "tokenizer").is_dir()):  # else it is the one that was loaded
            write_folder(folder / "tokenizer", parts.tokenizer.save_pretrained)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None


def check_shared(config: TrainConfig, dist: Dist) -> None:
    """Every rank writes its part of a checkpoint into the folder that rank 0 has just made."""
    folder = Path(config.output_dir)
    if not dist.all_true((folder / "config.json").is_file()):
        raise UserError(f"--output_dir {folder} is not visible on every node: choose a folder that all of them share")
