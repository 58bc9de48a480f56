"""Which rank of a run this process is: the launcher's environment variables, checked, and completed where one is left
out (Kubernetes and people set RANK and WORLD_SIZE alone). Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ds_tokimg.errors import UserError, raise_problems

# The rank within a host by the names that other launchers give it.
_LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def world_size(variables: MutableMapping[str, str] = os.environ) -> int:
    """The number of ranks, 1 where nothing says so. Raises UserError where the variable is no such number."""
    return _number(variables, "WORLD_SIZE", least=1) or 1


def complete(devices: int, variables: MutableMapping[str, str] = os.environ) -> None:
    """Set what joining a process group needs; without a RANK this process becomes the only rank of one.

    devices: accelerators that this process sees, 0 on a CPU. Raises one UserError that lists what is missing or wrong.
    """
    rank, size = _number(variables, "RANK"), world_size(variables)
    if rank is None and size == 1:  # port 0: any that is free, as nobody else has to find it
        variables.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        return
    problems = []
    if rank is None:
        problems.append(f"WORLD_SIZE is {size} and RANK is not set: each process needs its own, from 0 to {size - 1}")
    elif rank >= size:
        problems.append(f"RANK is {rank} and WORLD_SIZE is {size}: the ranks are 0 to {size - 1}")
    for name, meaning in (("MASTER_ADDR", "the host of rank 0"), ("MASTER_PORT", "a free port on it")):
        if size > 1 and not variables.get(name):
            problems.append(f"{name} is not set: {meaning}, the same for all ranks")
    raise_problems(
        "the ranks of the run cannot find each other (torchrun and deepspeed set these environment variables; unset "
        "RANK and WORLD_SIZE for a run of one process):",
        problems,
    )
    variables.update(RANK=str(rank), WORLD_SIZE=str(size))
    if size == 1:
        variables.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} | _given(variables))
    if _number(variables, "LOCAL_RANK") is None:
        found = next((number for name in _LOCAL_RANKS if (number := _number(variables, name)) is not None), None)
        variables["LOCAL_RANK"] = str((rank or 0) % max(1, devices) if found is None else found)


def _given(variables: MutableMapping[str, str]) -> dict[str, str]:
    return {name: variables[name] for name in ("MASTER_ADDR", "MASTER_PORT") if variables.get(name)}


def _number(variables: MutableMapping[str, str], name: str, least: int = 0) -> int | None:
    text = variables.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"the environment variable {name} is {text!r}: expected a whole number of at least {least}")
    return int(text)
