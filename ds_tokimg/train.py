"""python -m ds_tokimg train: one run, from the command line to the last checkpoint.

Read `train` for the order of things, then run.py (what happens in a step), engine.py (the optimiser step), loss.py (the
objective) and model.py (the network).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg import ds_config
from ds_tokimg.allocator import keep_freed_memory
from ds_tokimg.config import TrainConfig, UserError, raise_problems
from ds_tokimg.ds_schema import check

if TYPE_CHECKING:
    from ds_tokimg.ranks import Dist
    from ds_tokimg.setup import Parts


def main(argv: list[str]) -> int:
    config = TrainConfig.from_args(argv)
    raw = ds_config.read(config.deepspeed_config)
    raise_problems(f"{config.deepspeed_config} cannot be used:", check(raw))
    keep_freed_memory()
    # Torch and DeepSpeed take seconds to import: help and mistakes are answered before.
    from ds_tokimg.engine import TrainingError, init_distributed

    dist = init_distributed()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("ds_tokimg").setLevel(logging.INFO if dist.rank == 0 else logging.ERROR)
    try:
        train(config, raw, dist)
    except TrainingError as error:
        if dist.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError:
        dist.leave()
        raise
    return 0


def train(config: TrainConfig, raw: dict, dist: Dist) -> None:
    """A whole run. Nothing is written before all settings, data and the model have been found to fit."""
    from ds_tokimg import checkpoint as checkpoints
    from ds_tokimg.engine import TrainEngine, machine_capabilities
    from ds_tokimg.run import Run
    from ds_tokimg.setup import assemble

    resumed = checkpoints.find(config.output_dir, config.resume, dist) if config.resume else None
    state = checkpoints.read_state(resumed) if resumed else {}
    dist.on_first_rank(lambda: check_output(config, resumed))
    parts = assemble(config, dist, resumed)
    settings, notes = ds_config.resolve(
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
        ds_config.save(settings, folder / "ds_config.json")
        parts.tokenizer.save_pretrained(folder / "tokenizer")
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None


def check_shared(config: TrainConfig, dist: Dist) -> None:
    """Every rank writes its part of a checkpoint into the folder that rank 0 has just made."""
    folder = Path(config.output_dir)
    if not dist.all_true((folder / "config.json").is_file()):
        raise UserError(f"--output_dir {folder} is not visible on every node: choose a folder that all of them share")
