"""Checkpoints of a run: written whole or not at all, found again, verified, resumed, and readable without DeepSpeed.

    OUTPUT/checkpoints/
      step_00001000/            the engine's own files, and
        model.safetensors       trained weights, fp32, whole
        ema_0.9999.safetensors  averaged weights, named for their decay
        trainer_state.json      step, epoch, consumed samples, best value, ..., and the engine's layout
        rng.pt                  states of torch's, numpy's and Python's generators, per rank
        validation.json         what a validation found after the checkpoint was saved: goes before trainer_state.json
        manifest.json           size and CRC-32 of each file; a folder without one is not a checkpoint
      latest, best              text files that hold a folder's name
      abandoned/                checkpoints of a branch that the run went back from

A checkpoint is written to a hidden folder, checksummed, renamed, and only then named in `latest`: a rank that is killed
at any moment leaves the earlier checkpoints as they were. This module does not import deepspeed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ds_tokimg.engine import elastic
from ds_tokimg.engine.optimizer import average_key
from ds_tokimg.engine.ranks import Dist, answering
from ds_tokimg.engine.saving import Saving
from ds_tokimg.engine.shards import FP32
from ds_tokimg.errors import TrainingError, UserError, shortened, value_problems
from ds_tokimg.settings import formats
from ds_tokimg.settings.files import sync_folder, write_text
from ds_tokimg.settings.manifest import MANIFEST, checksums, files_in, verify, write_manifest
from ds_tokimg.settings.tensors import read_pickled, read_weights, write_weights

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import TrainEngine


logger = logging.getLogger(__name__)

TRAINER_STATE = formats.TRAINER_STATE
VALIDATION = "validation.json"
RNG = "rng.pt"
WEIGHTS = "model.safetensors"
FOLDER = "checkpoints"
ABANDONED = "abandoned"
# What a reader of the engine's files must know, see `_engine_state`.
ENGINE_STATE = {
    **dict.fromkeys(("stage", "partitions", "world_size", "updates"), int),
    **dict.fromkeys(("precision", "optimizer"), str),
    **dict.fromkeys(("groups", "states"), list),
    **dict.fromkeys(("params", "zero"), dict),
    "ema_decay": float,
}
VALIDATION_STATE = {"best": float | None, "best_step": int | None, "bits_per_token": float | None}
# Of the trainer's own state, where it is there.
TRAINER_VALUES = {
    **dict.fromkeys(("epoch", "consumed_samples", "train_batch_size"), int),
    "validation_due": bool,
    "place": list[int] | None,
    "schedule": dict | None,
    "figures": dict | None,
    **VALIDATION_STATE,
}
_LONGEST_NAME = 100
TAG = re.compile(r"step_\d{8,}")
_UNFINISHED = ".unfinished_"  # folders being written, or replaced: never read


class NotFinite(TrainingError):
    """There is nothing to save: weights, averages or states of the optimiser hold NaN or infinity."""


def tag_of(step: int) -> str:
    """Folder name of the checkpoint of an optimiser step; names sort as steps do."""
    return f"step_{step:08d}"


def save(
    engine: TrainEngine,
    output_dir: str | Path,
    state: dict,
    *,
    write: Callable[[Path], object] | None = None,
    best: bool = False,
    keep: int = 3,
    back_at: int | None = None,
) -> Path:
    """Write a checkpoint of the whole run. Collective.

    Args:
        state: the trainer's own state, JSON values (epoch, consumed samples, best value, settings, ...). The
            optimiser step and the engine's layout are added.
            `best_step`, where it is given, is the step of the best checkpoint so far.
        write: puts further files into the folder that it is given, on rank 0.
        best: also name it in `best`. keep: newest checkpoints to keep; those named in `latest` and `best` stay anyway.
        back_at: the step that the run has gone on from, in its first save: later checkpoints in the folder are of a
            branch that it left, and are set aside once this one is complete.

    Returns the checkpoint's folder. Raises NotFinite where a weight, an average or a state of the optimiser is not
    finite on any rank, and CannotWrite where any rank cannot write (disk full, no permission, folder gone). All ranks
    raise the same; the earlier checkpoints are as they were, and nothing unfinished is left.
    """
    root, dist, tag = Path(output_dir) / FOLDER, engine.dist, tag_of(engine.global_steps)
    folder = root / (_UNFINISHED + tag)
    if not dist.all_true(engine.shards.finite()):
        raise NotFinite(f"step {engine.global_steps} is not saved: weights or states of the optimiser are not finite")
    saving = Saving(root.parent, dist)
    with answering(), saving.undone_by(folder), dist.progress.while_doing("saving a checkpoint"):
        saving.on_first_rank(lambda: _start(folder))
        _save_engine(engine, folder, saving)
        _save_weights(engine, folder, saving)
        generators = dist.gather(_generator_states())
        state = {"format": formats.FORMAT, **state, "step": engine.global_steps, "engine": _engine_state(engine)}
        saving.on_first_rank(lambda: _save_state(folder, state, generators, write))
        # Each rank reads its share of the files.
        entries = saving.on_each_rank(lambda: checksums(folder, files_in(folder)[dist.rank :: dist.world_size]))
        saving.on_first_rank(lambda: _finish(folder, root / tag, entries, best))
        if back_at is not None:
            saving.on_first_rank(lambda: _set_aside(root, tag, back_at, state.get("best_step")))
        saving.on_first_rank(lambda: _prune(root, keep))
    return root / tag


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove what a process that was killed in a save has left, which nothing reads and which takes room."""
    for path in (Path(output_dir) / FOLDER).glob(_UNFINISHED + "*"):
        shutil.rmtree(path, ignore_errors=True)


def newest_sane(output_dir: str | Path) -> Path | None:
    """The newest checkpoint, up to the one named in `latest`, whose trainer found its losses sane (`"sane"` in its
    state; one that says nothing is taken to be); None where there is none."""
    root = Path(output_dir) / FOLDER
    last = _pointer(root, "latest")
    tags = [tag for tag in _tags(root)[::-1] if last is None or tag <= last]
    return next((root / tag for tag in tags if _is_sane(root / tag)), None)


def _is_sane(checkpoint: Path) -> bool:
    try:
        return formats.read_object(checkpoint / TRAINER_STATE).get("sane", True) is not False
    except UserError:
        return False


def add_validation(output_dir: str | Path, step: int, figures: dict, best: bool) -> bool:
    """Add to the checkpoint of a step what a validation of it found, after it was saved; False where there is none.

    Args:
        figures: values of the trainer's state, see VALIDATION_STATE.
        best: also name the checkpoint in `best`.

    On rank 0. A run that is killed in here validates again.
    """
    folder = Path(output_dir) / FOLDER / tag_of(step)
    if not (folder / MANIFEST).is_file():
        return False
    if best:
        name_best(output_dir, step)
    _write_json(folder / VALIDATION, figures)
    return True


def name_best(output_dir: str | Path, step: int) -> None:
    """Name the checkpoint of a step in `best`, where there is one. On rank 0."""
    root = Path(output_dir) / FOLDER
    if (root / tag_of(step) / MANIFEST).is_file():
        write_text(root / "best", tag_of(step))


def load(engine: TrainEngine, checkpoint: str | Path, work_dir: str | Path | None = None) -> dict:
    """Restore an engine that has not stepped yet from a checkpoint of any world size and ZeRO stage. Collective.

    With the checkpoint's own layout the run goes on bit for bit; from another one it is converted, see elastic.py.

    Args:
        work_dir: where a conversion may put its files, the folder of the checkpoint if not given.

    Returns the trainer's state as given to `save`, and `step`.
    """
    checkpoint = Path(checkpoint)
    if not engine.dist.all_true((checkpoint / MANIFEST).is_file()):
        raise UserError(f"{checkpoint} is not visible on every node: keep --output_dir where they all see it")
    written, state = _read_state(checkpoint)
    saved = state.pop("engine")
    names = formats.parameter_names(saved["params"], written)
    elastic.check_same_model(engine, saved, names, checkpoint)
    renamed = any(name != old for old, name in names.items())
    with _reading(checkpoint):
        if not renamed and all(saved[key] == value for key, value in engine.layout.items()):
            engine.load_same_layout(checkpoint)
        else:
            elastic.load(engine, checkpoint, saved, names, Path(work_dir or checkpoint.parent))
        engine.resume_schedule()
    engine.dist.progress.step = engine.global_steps
    with _reading(checkpoint / RNG):
        _restore_generators(checkpoint, engine.dist.rank)
    return state


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within: files whose content cannot be used are a mistake in them, whatever it is that stumbles over it."""
    try:
        with answering():
            yield
    except (UserError, TrainingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{path} does not hold what {TRAINER_STATE} says ({reason}); use another checkpoint") from error


def read_state(checkpoint: str | Path) -> dict:
    """The trainer's state of a checkpoint. UserError when the folder is none, or its file is broken or of a newer
    version."""
    return _read_state(Path(checkpoint))[1]


def _read_state(checkpoint: Path) -> tuple[int, dict]:
    """The format that a checkpoint was written in, and its state in today's."""
    path = checkpoint / TRAINER_STATE
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a checkpoint: there is no {TRAINER_STATE} in it")
    written = formats.read_together({TRAINER_STATE: path})
    state = written.files[TRAINER_STATE]
    own = {key: state[key] for key in ("step", "engine") if key in state}
    formats.refuse(path, value_problems(own, {"step": int, "engine": dict}))
    values = {key: state[key] for key in TRAINER_VALUES if key in state}
    kinds = {key: TRAINER_VALUES[key] for key in values}
    formats.refuse(path, value_problems(values, kinds) + value_problems(state["engine"], ENGINE_STATE, "engine."))
    return written.format, state | _later_validation(checkpoint / VALIDATION)


def _later_validation(path: Path) -> dict:
    if not path.is_file():
        return {}
    figures = formats.read_object(path)
    kinds = VALIDATION_STATE | ({"figures": TRAINER_VALUES["figures"]} if "figures" in figures else {})
    formats.refuse(path, value_problems(figures, kinds))
    return {**figures, "validation_due": False}


def load_weights(checkpoint: str | Path, which: str = "ema", prefix: str = "model.") -> dict[str, Tensor]:
    """Whole fp32 weights of a checkpoint, by parameter name, on the CPU.

    Args:
        which: "ema" for the averaged weights (the trained ones when the run kept no average), or "trained".
        prefix: taken off the names that have it, so that they are those of the model inside the trained module.

    Raises UserError for a folder that is no checkpoint, or when the file is damaged.
    """
    checkpoint = Path(checkpoint)
    written, state = _read_state(checkpoint)
    decay = state["engine"]["ema_decay"]
    name = f"{average_key(decay)}.safetensors" if which == "ema" and decay else WEIGHTS
    problem = verify(checkpoint, [name])
    if problem:
        raise UserError(f"{checkpoint} is damaged: {problem}; use another checkpoint of the run")
    weights = read_weights(checkpoint / name)
    names = formats.parameter_names(weights, written)
    return {names[key].removeprefix(prefix): value for key, value in weights.items()}


def find(output_dir: str | Path, which: str = "latest", dist: Dist | None = None) -> Path:
    """The folder of a checkpoint that is verified, the same on all ranks (rank 0 decides).

    Args:
        which: "latest" or "best" of the run in `output_dir`, or a folder: a checkpoint, or a run (its latest).

    A damaged `latest` or `best` gives way to the newest checkpoint that is whole, with a warning.
    Raises UserError on all ranks when there is none, or when a checkpoint named by its folder is damaged.
    """
    if dist is None:
        return _find(Path(output_dir), which)
    return dist.on_first_rank(lambda: _find(Path(output_dir), which))


def _engine_state(engine: TrainEngine) -> dict:
    """The engine's layout and what else a reader of its files must know."""
    shards = engine.shards
    return {
        **engine.layout,
        "world_size": engine.dist.world_size,
        "states": shards.keys,
        "updates": shards.updates,
        "ema_decay": engine.ema_decay,
    }


def _find(output_dir: Path, which: str) -> Path:
    if which not in ("latest", "best"):
        folder = Path(which)
        if (folder / FOLDER).is_dir():
            return _find(folder, "latest")
        problem = verify(folder) if folder.is_dir() else "there is no such folder"
        if problem:
            raise UserError(f"cannot resume from {which!r}: {problem}")
        return folder if folder.name else Path(os.path.abspath(folder))  # "." has no name, and a checkpoint's is needed
    root = output_dir / FOLDER
    tags, named, newest = _tags(root)[::-1], _pointer(root, which), _pointer(root, "latest")
    if newest is not None:  # what is later may belong to a branch that the run has left: the last resort
        tags.sort(key=lambda tag: tag > newest)
    if not tags and named is None:
        raise UserError(f"no checkpoint in {root}: check --output_dir, or start a new run without --resume")
    for tag in dict.fromkeys([named, *tags] if named else tags):
        problem = verify(root / tag)
        if problem is None:
            if tag != named:
                logger.warning("%s: using %s in place of the damaged or missing %s", root, tag, named or which)
            return root / tag
        logger.warning("%s cannot be used: %s", root / tag, problem)
    raise UserError(f"no checkpoint in {root} is whole: resume from another folder, or start a new run")


def _pointer(root: Path, which: str) -> str | None:
    """The checkpoint's name in `latest` or `best`; None where there is no such file, or something else in it."""
    path = root / which
    if not path.is_file():
        return None
    name = path.read_bytes()[:_LONGEST_NAME].decode(errors="replace").strip()
    if TAG.fullmatch(name):
        return name
    logger.warning("%s names no checkpoint: %s", path, shortened(name))
    return None


def _start(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder.parent.parent)
    folder.mkdir()


def _save_engine(engine: TrainEngine, folder: Path, saving: Saving) -> None:
    """DeepSpeed's own files. Its ranks wait for each other in there: one that cannot write says so afterwards."""
    deepspeed, files = engine.engine, engine.engine.checkpoint_engine
    writers = [(files, "save"), (files, "makedirs"), (deepspeed, "_copy_recovery_script")]
    for owner, name in writers:
        setattr(owner, name, saving.later(getattr(owner, name)))
    try:
        deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    finally:
        for owner, name in writers:
            delattr(owner, name)
    saving.agree()


def _save_state(folder: Path, state: dict, generators: list, write: Callable[[Path], object] | None) -> None:
    torch.save(generators, folder / RNG)
    if write is not None:
        write(folder)
    _write_json(folder / TRAINER_STATE, state)


def _finish(folder: Path, target: Path, entries: list[dict], best: bool) -> None:
    """Manifest, name, pointers: from here on it is a checkpoint."""
    write_manifest(folder, {name: entry for part in entries for name, entry in part.items()})
    pointers = ("latest", "best") if best else ("latest",)
    for pointer in pointers:  # before the folder has its name: afterwards nothing more needs room on the disk
        write_text(target.parent / f".{pointer}.new", target.name)
    _publish(folder, target)
    for pointer in pointers:
        os.replace(target.parent / f".{pointer}.new", target.parent / pointer)
    sync_folder(target.parent)


def _set_aside(root: Path, saved: str, back_at: int, best_step: int | None) -> None:
    """Checkpoints later than step `back_at`, but for the one just saved, are found no more; nor is a best one among
    them, in place of which the best before it is named."""
    left = [tag for tag in _tags(root) if tag > tag_of(back_at) and tag != saved]
    best = _pointer(root, "best")
    if best is not None and best > tag_of(back_at) and (best_step is None or best != tag_of(best_step)):
        (root / "best").unlink()
        if best_step is not None:
            name_best(root.parent, best_step)
    if not left:
        return
    aside = root / ABANDONED
    aside.mkdir(exist_ok=True)
    for tag in left:
        shutil.rmtree(aside / tag, ignore_errors=True)
        os.rename(root / tag, aside / tag)
    sync_folder(root)
    logger.info("gone back to step %d: set aside in %s: %s", back_at, aside, ", ".join(left))


def _save_weights(engine: TrainEngine, folder: Path, saving: Saving) -> None:
    """Whole weights, trained and averaged, gathered parameter by parameter; rank 0 keeps and writes them."""
    shards, keys = engine.shards, engine.shards.keys
    persistent = engine.module.state_dict().keys()
    buffers = {name: b.cpu() for name, b in engine.module.named_buffers() if name in persistent}
    average = engine.optimizer.average
    for name, key in {WEIGHTS: FP32, **({f"{average}.safetensors": average} if average else {})}.items():
        weights = {}
        for param_name, param in shards.params.items():
            # Before the first step the average is the weights themselves.
            value = shards.full(param, key if key in keys else FP32)
            if engine.dist.rank == 0:
                weights[param_name] = value.detach().float().cpu().contiguous()
        saving.on_first_rank(partial(write_weights, {**weights, **buffers}, folder / name))


def _publish(folder: Path, target: Path) -> None:
    """Give a finished folder its name; a checkpoint of the same step (of a resumed run) makes way for it."""
    if target.exists():
        replaced = target.with_name(_UNFINISHED + "replaced_" + target.name)
        os.rename(target, replaced)
        os.rename(folder, target)
        shutil.rmtree(replaced)
    else:
        os.rename(folder, target)
    sync_folder(target.parent)


def _tags(root: Path) -> list[str]:
    """Names of the finished checkpoints, in the order of their steps."""
    return sorted(path.parent.name for path in root.glob(f"step_*/{MANIFEST}"))


def _prune(root: Path, keep: int) -> None:
    """Keep the newest checkpoints, those that are named, and the newest one from which a diverged run can be saved."""
    tags, sane = _tags(root), newest_sane(root.parent)
    kept = {_pointer(root, "latest"), _pointer(root, "best"), sane.name if sane else None}
    for tag in tags[:-keep]:
        if tag not in kept:
            shutil.rmtree(root / tag, ignore_errors=True)


def _write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1))


def _generator_states() -> dict:
    """The states of all global generators, as values that torch loads without running code."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def _restore_generators(checkpoint: Path, rank: int) -> None:
    """A rank that the checkpoint does not know keeps the states it has: data and noise do not depend on them."""
    states = read_pickled(checkpoint / RNG)
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
