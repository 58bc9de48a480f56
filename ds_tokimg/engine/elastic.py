"""Resuming on another number of ranks, ZeRO stage or precision than a checkpoint was written with, or by a version that
had other names for the parameters.

DeepSpeed's answer is its universal checkpoint: one folder per parameter with the whole fp32 weight and the whole of
each optimiser state, from which every rank takes its part. Its format is kept here (`zero/NAME/{fp32,exp_avg,...}.pt`,
`zero/optimizer_state.pt`); its converter and loader are not, because in 0.19.8 they
  - cannot read or fill stage 0, nor go from stages 1 and 2 to stage 3 or back;
  - carry `exp_avg` and `exp_avg_sq` only, so that averaged weights would be lost;
  - at stage 3 give every parameter group the settings of the first, weight decay included.

Rank 0 converts into a folder of the run and deletes it once all ranks have loaded.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_tokimg.engine.optimizer import AVERAGE_PREFIX
from ds_tokimg.engine.shards import FP32
from ds_tokimg.errors import UserError

if TYPE_CHECKING:
    from ds_tokimg.engine.engine import TrainEngine


logger = logging.getLogger(__name__)

UNIVERSAL = ".unfinished_universal"  # the prefix has the next save remove what a killed process left
OPTIMIZER_STATE = "optimizer_state.pt"
Reader = Callable[[Path], dict]  # reads one of the engine's files, memory-mapped
States = dict[str, Tensor]  # "fp32" and the optimiser's states of one parameter, whole


def check_same_model(engine: TrainEngine, saved: dict, names: dict[str, str], checkpoint: Path) -> None:
    """UserError when a checkpoint's parameters or optimiser are not those of the engine.

    names: {name in the checkpoint: today's} of its parameters.
    """
    layout = engine.layout
    if saved["optimizer"] != layout["optimizer"]:
        raise UserError(
            f"{checkpoint} was trained with {saved['optimizer']} and the DeepSpeed JSON now asks for "
            f"{layout['optimizer']}: change it back, or start a new run from these weights with --init_from"
        )
    ours, theirs = layout["params"], {names[name]: shape for name, shape in saved["params"].items()}
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{checkpoint} holds another model: {name} has shape {theirs.get(name, 'none')} there and "
                f"{ours.get(name, 'none')} here; use the settings in the config.json of its run"
            )


def load(engine: TrainEngine, checkpoint: Path, saved: dict, names: dict[str, str], work_dir: Path) -> None:
    """Fill an engine that has not stepped yet from a checkpoint of another layout. Collective.

    Args:
        saved: the layout in the checkpoint. names: {name in the checkpoint: today's} of its parameters.
        work_dir: folder to convert in, shared by all nodes. Needs room for the whole fp32 weights and states.
    """
    universal = work_dir / UNIVERSAL
    logger.info(
        "%s was written by %s; this run has %s: converting it through a universal checkpoint",
        *(checkpoint, describe(saved), describe({**engine.layout, "world_size": engine.dist.world_size})),
    )
    try:
        engine.dist.on_first_rank(lambda: _convert_with_care(checkpoint, saved, names, universal, engine.read_file))
        if not engine.dist.all_true((universal / "zero" / OPTIMIZER_STATE).is_file()):
            raise UserError(f"{work_dir} is not visible on every node: keep --output_dir where they all see it")
        _fill(engine, universal)
        engine.restore_counters(engine.read_file(model_file(checkpoint)))
        engine.dist.barrier()
    finally:
        if engine.dist.rank == 0:
            shutil.rmtree(universal, ignore_errors=True)


def describe(layout: dict) -> str:
    """`2 ranks, ZeRO stage 1, fp32`."""
    ranks = layout["world_size"]
    return f"{ranks} rank{'s' if ranks > 1 else ''}, ZeRO stage {layout['stage']}, {layout['precision']}"


def _convert_with_care(checkpoint: Path, saved: dict, names: dict[str, str], universal: Path, read: Reader) -> None:
    """Convert if there is permission and room for it, else UserError."""
    shutil.rmtree(universal, ignore_errors=True)
    parameters = sum(math.prod(shape) for shape in saved["params"].values())
    needed = 4 * parameters * (1 + len(saved["states"]))  # bytes: fp32 weights and states
    try:
        universal.mkdir(parents=True)
        room = shutil.disk_usage(universal).free
    except OSError as error:
        raise UserError(f"cannot convert {checkpoint} in {universal.parent}: {error.strerror}") from None
    if room < 1.05 * needed:
        raise UserError(
            f"cannot convert {checkpoint} in {universal.parent}: that takes {needed / 2**30:.2f} GiB for a while and "
            f"only {room / 2**30:.2f} GiB are free"
        )
    convert(checkpoint, saved, names, universal, read)


def convert(checkpoint: Path, saved: dict, names: dict[str, str], universal: Path, read: Reader) -> None:
    """Write the universal form of a checkpoint of layout `saved` to the folder `universal`, under today's `names`."""
    source = {0: _whole_states, 1: _flat_states, 2: _flat_states, 3: _partitioned_states}[saved["stage"]]
    updates = torch.tensor(float(saved["updates"]))
    for name, states in source(checkpoint, saved, read):
        folder = universal / "zero" / names[name]
        folder.mkdir(parents=True)
        for key, value in states.items():
            # A view would be written with all of the memory that it is a part of.
            torch.save({"param": value.float().reshape(saved["params"][name]).clone()}, folder / f"{key}.pt")
        torch.save(updates, folder / "step.pt")
    torch.save(_common_state(checkpoint, saved, read, updates), universal / "zero" / OPTIMIZER_STATE)


def model_file(checkpoint: Path) -> Path:
    """The engine's file with the counters, the schedule and (below stage 3) the module."""
    return next(
        path for rank in ("", "*zero_pp_rank_0_") for path in checkpoint.glob(f"{rank}mp_rank_00_model_states.pt")
    )


def _shard_files(checkpoint: Path, saved: dict) -> list[Path]:
    """The optimiser's file of each rank; the engine prefixes their names with the precision."""
    pattern = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    return [next(checkpoint.glob(pattern.format(rank))) for rank in range(saved["partitions"])]


def _whole_states(checkpoint: Path, saved: dict, read: Reader) -> Iterator[tuple[str, States]]:
    """Stage 0: one file; the optimiser's states are numbered in the order of its parameter groups."""
    file = read(model_file(checkpoint))
    for index, name in enumerate(itertools.chain(*saved["groups"])):
        states = file["optimizer"]["state"].get(index, {})
        yield name, {FP32: file["module"][name], **{key: states[key] for key in saved["states"] if key in states}}


def _flat_states(checkpoint: Path, saved: dict, read: Reader) -> Iterator[tuple[str, States]]:
    """Stages 1 and 2: on each rank a part of every group's flat buffer, and where in it a parameter's part lies."""
    shards = [read(path)["optimizer_state_dict"] for path in _shard_files(checkpoint, saved)]
    for group, names in enumerate(saved["groups"]):
        flats = [
            {
                FP32: shard["single_partition_of_fp32_groups"][group],
                **shard["base_optimizer_state"]["state"].get(group, {}),
            }
            for shard in shards
        ]
        for name in names:
            places = [shard["param_slice_mappings"][group].get(name) for shard in shards]
            parts = [(flat, place) for flat, place in zip(flats, places, strict=True) if place is not None]
            yield (
                name,
                {
                    key: torch.cat([flat[key].narrow(0, place.start, place.numel) for flat, place in parts])
                    for key in (FP32, *saved["states"])
                    if key in flats[0]  # not every group has every state
                },
            )


def _partitioned_states(checkpoint: Path, saved: dict, read: Reader) -> Iterator[tuple[str, States]]:
    """Stage 3: every parameter is cut into equal parts, the last one padded; a sub-group's parts lie one by one."""
    shards = [read(path)["optimizer_state_dict"] for path in _shard_files(checkpoint, saved)]
    for sub_group, shapes in enumerate(read(model_file(checkpoint))["param_shapes"]):
        flats = [
            {FP32: shard["fp32_flat_groups"][sub_group], **shard["optimizer_state_dict"]["state"].get(sub_group, {})}
            for shard in shards
        ]
        offset = 0
        for name, shape in shapes.items():
            size = math.ceil(shape.numel() / len(shards))
            yield (
                name,
                {
                    key: torch.cat([flat[key].narrow(0, offset, size) for flat in flats])[: shape.numel()]
                    for key in (FP32, *saved["states"])
                    if key in flats[0]
                },
            )
            offset += size


def _common_state(checkpoint: Path, saved: dict, read: Reader, updates: Tensor) -> dict:
    """What is no parameter's own: settings of the groups and the loss scaler, where DeepSpeed's loader looks for it."""
    file = read(model_file(checkpoint))
    shard = {} if saved["stage"] == 0 else read(_shard_files(checkpoint, saved)[0])["optimizer_state_dict"]
    torch_states: dict[int, Any] = {0: file["optimizer"], 3: shard.get("optimizer_state_dict")}
    torch_state: Any = torch_states.get(saved["stage"], shard.get("base_optimizer_state"))
    groups = [{**group, "params": []} for group in torch_state["param_groups"]]
    scaler = {key: shard[key] for key in ("loss_scaler", "dynamic_loss_scale") if key in shard}
    steps = {"state": {0: {"step": updates}}, "param_groups": groups}
    return {**scaler, "param_groups": groups, "optimizer_state_dict": steps, "ds_version": file["ds_version"]}


def _fill(engine: TrainEngine, universal: Path) -> None:
    """Take this rank's parts out of a universal checkpoint."""
    common = engine.read_file(universal / "zero" / OPTIMIZER_STATE)
    updates = int(common["optimizer_state_dict"]["state"][0]["step"])
    folders = {name: universal / "zero" / name for name in engine.shards.params}
    found = {path.stem for folder in folders.values() for path in folder.glob("*.pt")} - {FP32, "step"}
    keys = sorted(k for k in found if not k.startswith(AVERAGE_PREFIX) or k == engine.optimizer.average)
    if updates > 0:
        engine.shards.allocate(keys, updates)
    for name, param in engine.shards.params.items():
        weight = engine.read_file(folders[name] / f"{FP32}.pt")["param"]
        engine.shards.fill(param, weight)
        for key in keys:
            path = folders[name] / f"{key}.pt"
            if path.is_file():
                engine.shards.fill(param, engine.read_file(path)["param"], key)
            elif key.startswith(AVERAGE_PREFIX):  # stage 0 keeps no state of a parameter without a gradient
                engine.shards.fill(param, weight, key)
    engine.restore_loss_scaler(common)
    engine.shards.refresh()
