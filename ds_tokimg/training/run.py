"""One run, from its settings to the last checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ds_tokimg.console import Work
from ds_tokimg.data.run_texts import RunTexts, file_of
from ds_tokimg.data.sources import MissingTexts
from ds_tokimg.errors import UserError, raise_problems
from ds_tokimg.settings import engine_json, formats
from ds_tokimg.settings.changes import changes
from ds_tokimg.settings.command_line import GIVEN_JSON, has_checkpoint
from ds_tokimg.settings.config import TrainConfig
from ds_tokimg.settings.files import check_folder, write_folder, write_text
from ds_tokimg.settings.unused import beyond_the_run
from ds_tokimg.training.lock import Lock, only_writer

if TYPE_CHECKING:
    from ds_tokimg.engine.ranks import Dist
    from ds_tokimg.training.assemble import Parts


def train(config: TrainConfig, raw: dict, dist: Dist) -> None:
    """A whole run. Nothing is written before all settings, data and the model have been found to fit, and nothing where
    another run is writing."""
    with dist.watched():
        config = dist.broadcast(config)  # what it says of the disk, all ranks take from the first
        dist.on_first_rank(lambda: check_folder("--output_dir", config.output_dir))
        with only_writer(config.output_dir, dist) as lock:
            _train(config, raw, dist, lock)


def _train(config: TrainConfig, raw: dict, dist: Dist, lock: Lock) -> None:
    from ds_tokimg.engine import checkpoint as checkpoints
    from ds_tokimg.engine.engine import TrainEngine, machine_capabilities
    from ds_tokimg.training import automatic, budget, restarts
    from ds_tokimg.training.loop import Run

    resumed = find_resumed(config, dist)
    state = checkpoints.read_state(resumed) if resumed else {}
    train_batch_size = state.get("train_batch_size")
    dist.on_first_rank(lambda: check_output(config, resumed))
    parts = put_together(config, dist, resumed)
    before, texts_notes = dist.on_first_rank(lambda: check_texts(config, parts, resumed))
    config, decided = automatic.decide(config, raw, parts.images, dist.world_size, train_batch_size)
    settings, notes = engine_json.resolve(raw, config, machine_capabilities(), parts.steps_per_epoch, train_batch_size)
    config = dataclasses.replace(config, train_batch_size=settings["train_batch_size"])
    config, read = budget.decide(config, parts)
    changed = dist.on_first_rank(lambda: changes(config, raw, resumed)) if resumed else []
    notes = [*parts.notes, *texts_notes, *changed, *notes]
    steps = config.epochs * parts.steps_per_epoch(config.train_batch_size)
    notes += [*automatic.short_schedule(steps, config), *beyond_the_run(config, steps), *parts.not_as_asked(config)]
    dist.on_first_rank(lock.take)
    dist.on_first_rank(lambda: check_output(config, resumed))  # another run may have been quicker
    dist.on_first_rank(lambda: restarts.note_start(config.output_dir, state.get("step", 0)))
    dist.on_first_rank(lambda: write_settings(config, raw, settings, parts))
    dist.on_first_rank(lambda: write_texts(config, parts, resumed))
    check_shared(config, dist)
    with Work("preparing the engine"):
        engine = TrainEngine(parts.module, settings, config.ema_decay, dist)
        if resumed:
            # A conversion writes to this run's folder: the checkpoint may lie where nobody can.
            state = checkpoints.load(engine, resumed, Path(config.output_dir) / checkpoints.FOLDER)
            if before is not None and before.validation != parts.eval_set.corpus.fingerprint:
                state |= {"best": None, "best_step": None}  # of other texts: no figure to compare with
        run = Run(config, settings, parts, engine, state)
    run.introduce([*decided, *read], notes, resumed)
    with run.signals:
        run.loop()
        run.finish()


def put_together(config: TrainConfig, dist: Dist, resumed: Path | None) -> Parts:
    """The parts of the run, of the same texts on all ranks."""
    from ds_tokimg.training.assemble import assemble, load_start

    start = load_start(config)
    try:
        parts = assemble(config, dist, resumed, start)
    except MissingTexts as error:
        if resumed is None:
            raise
        raise UserError(
            f"{error}. If the texts of the run have moved, name their new place: --data_path NEW (and --eval_data_path "
            "NEW) beside --resume; the same texts are the same run wherever they lie"
        ) from None
    texts = dist.gather((parts.train_set.corpus.fingerprint, parts.eval_set.corpus.fingerprint))
    others = [str(rank) for rank, found in enumerate(texts) if found != texts[0]]
    if others:
        raise UserError(
            f"{' '.join(config.data_path)}: rank(s) {', '.join(others)} read other texts there than rank 0: give all "
            "hosts the same files, in the same order"
        )
    return parts


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
        config.located().save(folder / "config.json")
        engine_json.save(raw, folder / GIVEN_JSON)
        engine_json.save(settings, folder / "ds_config.json")
        if not (has_checkpoint(folder) and (folder / "tokenizer").is_dir()):  # else it is the one that was loaded
            write_folder(folder / "tokenizer", parts.tokenizer.save_pretrained)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None


def check_texts(config: TrainConfig, parts: Parts, resumed: Path | None) -> tuple[RunTexts | None, list[str]]:
    """What the run that goes on was trained on (None where it does not say), and what is to be said about it.

    Raises UserError where these are other texts, unless the settings accept them.
    """
    if resumed is None:
        return None, []
    before = RunTexts.load(file_of(resumed))
    if before is None:
        return None, ["the run does not say which texts it was trained on: these are taken for the same"]
    changes = RunTexts.of(parts.train_set, parts.eval_set).changes(before)
    if changes and not config.accept_other_texts:
        raise_problems(
            f"{' '.join(config.data_path)}: not the texts that the run was trained on (name its own, or go on with "
            "these: --accept_other_texts; then their order and the held-out texts are others, and the best validation "
            "begins anew):",
            changes,
        )
    return before, [f"other texts than before, as accepted: {change}" for change in changes]


def write_texts(config: TrainConfig, parts: Parts, resumed: Path | None) -> None:
    """data.json: by what the run's texts are known again, and those of the run or the weights that it goes on from."""
    from ds_tokimg.inference.loading import find_folder

    texts = RunTexts.of(parts.train_set, parts.eval_set)
    start = find_folder(Path(config.init_from)) if config.init_from else resumed
    if start is not None:
        texts = texts.after(RunTexts.load(file_of(start)))
    write_text(Path(config.output_dir) / formats.DATA, texts.description())


def check_shared(config: TrainConfig, dist: Dist) -> None:
    """Every rank writes its part of a checkpoint into the folder that rank 0 has just made."""
    folder = Path(config.output_dir)
    if not dist.all_true((folder / "config.json").is_file()):
        raise UserError(f"--output_dir {folder} is not visible on every node: choose a folder that all of them share")
