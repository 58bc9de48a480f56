"""What the start of a run changes in its process, so that importing the engine changes nothing.

What `quiet`, `without_host_kernels` and `import_muon` change is as it was afterwards; `hush` lasts as long as the run.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator

_HOST_KERNELS = "deepspeed_shm_comm"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within: nothing below an error is logged. DeepSpeed, when it is first imported, warns that a machine has no GPU,
    which is no news to its user."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def hush() -> None:
    """From here on DeepSpeed logs errors only, and nobody is warned that it calls collectives by names that torch is
    about to retire, several times a step."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")


@contextlib.contextmanager
def without_host_kernels() -> Iterator[None]:
    """Within: DeepSpeed does not compile a C++ operation for collectives on a CPU, as it does when it joins a process
    group; without it gloo does the same work."""
    from deepspeed.ops import __compatible_ops__ as compatible

    before = compatible.get(_HOST_KERNELS, False)
    compatible[_HOST_KERNELS] = False
    try:
        yield
    finally:
        compatible[_HOST_KERNELS] = before


def import_muon() -> None:
    """ZeRO imports Muon to ask whether an optimiser is one, and the import prepares its kernels for torch.compile,
    which takes longer than all else that DeepSpeed does to start. Ours never is one: import it before, without them."""
    from deepspeed.runtime import compiler

    compile_kernel = compiler.compile
    compiler.compile = lambda *args, **kwargs: lambda kernel: kernel
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_kernel
