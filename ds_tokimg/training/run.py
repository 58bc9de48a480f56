"""One run, from its settings to the last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.errors import UserError
from ds_tokimg.settings import engine_json
from ds_tokimg.settings.config import TrainConfig

if TYPE_CHECKING:
    from ds_tokimg.engine.ranks import Dist
    from ds_tokimg.training.assemble import Parts


def train(config: TrainConfig, raw: dict, dist: Dist) -> None:
    """A whole run. Nothing is written before all settings, data and the model have been found to fit."""
    from ds_tokimg.engine import checkpoint as checkpoints
    from ds_tokimg.engine.engine import TrainEngine, machine_capabilities
    from ds_tokimg.training.assemble import assemble
    from ds_tokimg.training.loop import Run

    resumed = checkpoints.find(config.output_dir, config.resume, dist) if config.resume else None
    state = checkpoints.read_state(resumed) if resumed else {}
    dist.on_first_rank(lambda: check_output(config, resumed))
    parts = assemble(config, dist, resumed)
    settings, notes = engine_json.resolve(
        raw, config, machine_capabilities(), parts.steps_per_epoch, state.get("train_batch_size")
    )
    dist.on_first_rank(lambda: write_settings(config, settings, parts))
    check_shared(config, dist)
    engine = TrainEngine(parts.module, settings, config.ema_decay, dist)
    if resumed:
        state = checkpoints.load(engine, resumed)
    run = Run(config, settings, parts, engine, state)
    run.introduce(notes, resumed)
    run.loop()
    run.finish()


def check_output(config: TrainConfig, resumed: Path | None) -> None:
    """A new run never writes into another's folder."""
    folder = Path(config.output_dir)
    if resumed is None and (folder / "checkpoints").is_dir():
        raise UserError(
            f"--output_dir {folder} already holds a run: go on with it (--resume latest) or choose another folder"
        )


def write_settings(config: TrainConfig, settings: dict, parts: Parts) -> None:
    """config.json, ds_config.json and the tokenizer: what resuming, evaluation and generation need."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.json")
        engine_json.save(settings, folder / "ds_config.json")
        parts.tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None


def check_shared(config: TrainConfig, dist: Dist) -> None:
    """Every rank writes its part of a checkpoint into the folder that rank 0 has just made."""
    folder = Path(config.output_dir)
    if not dist.all_true((folder / "config.json").is_file()):
        raise UserError(f"--output_dir {folder} is not visible on every node: choose a folder that all of them share")
