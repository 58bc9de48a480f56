"""Where ZeRO keeps each parameter's fp32 value and optimiser state, behind one interface for stages 0 to 3.

The optimiser of stage 0 works on the parameters themselves; stages 1 and 2 give it one flat fp32 partition per group,
stage 3 one per sub-group, and a rank holds only its own part. `Shards` reads, fills and swaps these.

Names of states: `fp32` is the weight itself, anything else a key of the optimiser's state such as `exp_avg`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_tokimg.engine.muon import Place
from ds_tokimg.engine.optimizer import UPDATES, Averaging

FP32 = "fp32"
ZeroParameter = Any  # an nn.Parameter with the methods that ZeRO hangs on it


class Shards:
    """The parts of weights and optimiser state that live on this rank.

    Args:
        engine: a DeepSpeedEngine. optimizer: the torch optimiser inside it. stage: 0 to 3.
    """

    def __init__(self, engine, optimizer: Averaging, stage: int):
        self.engine, self.optimizer, self.stage = engine, optimizer, stage
        self.zero = engine.optimizer  # DeepSpeed's wrapper; at stage 0 the optimiser itself

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in the module's order; under ZeRO-3 their data is elsewhere."""
        return {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}

    @property
    def stepped(self) -> list[Tensor]:
        """The fp32 tensors that the optimiser steps on this rank: the keys of its state."""
        if self.stage == 0:
            return list(self.params.values())
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    @property
    def keys(self) -> list[str]:
        """Keys of the optimiser's states that are as large as the weights, sorted; none before the first step."""
        keys = {
            key
            for tensor in self.stepped
            for key, value in self.optimizer.state.get(tensor, {}).items()
            if torch.is_tensor(value) and value.shape == tensor.shape and value.dim() > 0
        }
        return sorted(keys)

    def group(self, index: int) -> dict:
        """The optimiser's parameter group of one of the tensors that it steps."""
        groups = self.optimizer.param_groups
        if self.stage == 0:
            return next(group for group in groups if any(p is self.stepped[index] for p in group["params"]))
        return groups[self.zero.sub_group_to_group_id[index] if self.stage == 3 else index]

    def places(self, tensor: Tensor) -> list[Place]:
        """Where in a tensor that the optimiser steps at stages 1 to 3 the parameters of its group lie, matrices all of
        them; the same parameters in the same order on every rank."""
        index = next(i for i, stepped in enumerate(self.stepped) if stepped is tensor)
        if self.stage < 3:
            return [_flat_place(p) for p in self.zero.bit16_groups[index]]
        places, offset = [], 0
        for p in self.zero.fp16_groups[index]:
            size = p.partition_numel()
            start = self.zero._get_param_partition_rank(p) * size
            places.append(Place(tuple(p.ds_shape), start, offset, max(0, min(size, p.ds_numel - start))))
            offset += size
        return places

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether weights and states of this rank are free of NaN and infinity. Nothing is copied."""
        largest = [
            torch.linalg.vector_norm(part, math.inf)
            for tensor in self.stepped
            for value in (tensor, *self.optimizer.state.get(tensor, {}).values())
            if torch.is_tensor(value) and value.is_floating_point()
            for part in self._parts(tensor, value)
            if part.numel()
        ]
        return all(math.isfinite(value) for value in torch.stack([v.cpu().float() for v in largest]).tolist())

    def _parts(self, tensor: Tensor, value: Tensor) -> list[Tensor]:
        """What belongs to parameters in a stepped tensor, or in a state of it: at stage 3 anything may lie between."""
        if self.stage < 3 or value.shape != tensor.shape:
            return [value]
        return [value[place.offset : place.offset + place.length] for place in self.places(tensor)]

    @property
    def updates(self) -> int:
        """Updates the optimiser has made so far."""
        return max((self.optimizer.state.get(t, {}).get(UPDATES, 0) for t in self.stepped), default=0)

    @torch.no_grad()
    def full(self, param: ZeroParameter, key: str = FP32) -> Tensor:
        """A parameter's fp32 weight or state in its own shape. Collective at stages 1 to 3."""
        state_key = None if key == FP32 else key
        if self.stage == 0:
            value = param.data if state_key is None else self.optimizer.state.get(param, {}).get(key)
            return param.data if value is None and key.startswith("ema_") else _or_zeros(value, param)
        if self.stage == 3:
            return self.zero.get_full_hp_param(param, state_key)
        if state_key is not None:
            self._link_states(param, key)
        return param.get_full_hp_param(state_key)

    @torch.no_grad()
    def allocate(self, keys: list[str], updates: int) -> None:
        """Give every tensor that the optimiser steps states `keys`, zero so far, as after `updates` steps."""
        for index, tensor in enumerate(self.stepped):
            own = [key for key in keys if self.optimizer.keeps(self.group(index), key)]
            state: dict[str, Any] = {key: torch.zeros_like(tensor.data) for key in own}
            self.optimizer.state[tensor] = state
            state[UPDATES] = updates
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(updates), device=tensor.device)  # fused kernels want it there

    @torch.no_grad()
    def fill(self, param: ZeroParameter, value: Tensor, key: str = FP32) -> None:
        """Copy this rank's part out of a whole weight or state `value`. Not collective; see `refresh`."""
        state_key = None if key == FP32 else key
        if self.stage == 0:
            target = param.data if state_key is None else self.optimizer.state[param][key]
            target.copy_(value)
        elif self.stage == 3:
            size = param.partition_numel()
            part = value.new_zeros(size)
            own = value.flatten()[self.zero._get_param_partition_rank(param) * size :][:size]
            part[: own.numel()] = own  # the last rank's part is padded
            self.zero.set_local_hp_param(part, param, state_key)
        else:
            if state_key is not None:
                self._link_states(param, key)
            param.set_full_hp_param(value, state_key)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that the module computes with from the fp32 ones. Collective."""
        if self.stage == 3:
            self.zero._partition_all_parameters()
            self._show(self.stepped)
        elif self.stage > 0:
            self.zero.update_lp_params()

    @contextlib.contextmanager
    def swapped(self, key: str) -> Iterator[None]:
        """The optimiser's state `key` in place of the module's weights, for reading only; then the weights again, bit
        for bit. Parameters that have no such state (yet) keep their weights. Collective."""
        if key not in self.keys:
            yield
            return
        swap = {0: self._swap_whole, 1: self._swap_flat, 2: self._swap_flat, 3: self._swap_partitioned}[self.stage]
        with swap(key):
            yield

    @contextlib.contextmanager
    def _swap_whole(self, key: str) -> Iterator[None]:
        weights = {p: p.data for p in self.stepped if key in self.optimizer.state.get(p, {})}
        try:
            for p in weights:
                p.data = self.optimizer.state[p][key]
            yield
        finally:
            for p, data in weights.items():
                p.data = data

    @contextlib.contextmanager
    def _swap_flat(self, key: str) -> Iterator[None]:
        """Stages 1 and 2 copy the fp32 partitions to the module and gather them: let them do so with the state."""
        weights = self.zero.single_partition_of_fp32_groups
        try:
            self.zero.single_partition_of_fp32_groups = [self.optimizer.state[t][key] for t in weights]
            self.refresh()
            yield
        finally:
            self.zero.single_partition_of_fp32_groups = weights
            self.refresh()

    @contextlib.contextmanager
    def _swap_partitioned(self, key: str) -> Iterator[None]:
        """Stage 3 has no whole weights, and in fp32 its partitions are the masters themselves: keep a copy of them."""
        self.zero._partition_all_parameters()
        weights = [flat.detach().clone() for flat in self.zero.fp16_partitioned_groups_flat]
        try:
            self._show([self.optimizer.state[t][key] for t in self.stepped])
            yield
        finally:
            self.zero._partition_all_parameters()
            self._show(weights)

    @torch.no_grad()
    def _show(self, flats: list[Tensor]) -> None:
        """Stage 3: values for the partitions that the module's weights are gathered from."""
        for index, flat in enumerate(flats):
            self.zero.fp16_partitioned_groups_flat[index].copy_(flat.detach())
            self.zero._unflatten_partitioned_parameters(index)
        persistent = self.zero.persistent_parameters
        if persistent:  # small parameters that every rank keeps whole
            persistent[0].all_gather(persistent)

    def _link_states(self, param: ZeroParameter, key: str) -> None:
        """Stages 1 and 2 link parameters with their states once, within the first step: too early for all groups but
        the first, and too late for a run that has just been resumed."""
        mapping = param._hp_mapping  # None where this rank holds no part of the parameter
        if mapping is not None and key not in (mapping.optim_fragment or {}):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def _flat_place(param: ZeroParameter) -> Place:
    """Stages 1 and 2: the part of a parameter in the flat partition of its group on this rank."""
    mapping = param._hp_mapping
    if mapping is None:
        return Place(tuple(param.shape), 0, 0, 0)
    whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Place(tuple(param.shape), whole.start, flat.start, flat.numel)


def _or_zeros(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like.data) if value is None else value
