"""Importing the engine changes nothing in a process; what a start changes is put back."""

import logging
import subprocess
import sys

import pytest

from ds_tokimg.engine import startup

# What a plain `import deepspeed` leaves, and whether it is as it was once the engine has been imported too.
SCRIPT = """
import importlib, logging, os, sys, warnings
import deepspeed
from deepspeed.runtime import compiler

NAMES = {module: list(vars(module)) for module in (deepspeed, compiler)}

def state():
    return {
        "disabled": logging.root.manager.disable,
        "level": logging.getLogger("DeepSpeed").level,
        "root": (logging.root.level, list(logging.root.handlers)),
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "operations": vars(deepspeed.ops).get("__compatible_ops__"),
        "muon": "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules,
        **{f"{module.__name__}.{name}": id(vars(module)[name]) for module in NAMES for name in NAMES[module]},
    }

before = state()
importlib.import_module("ds_tokimg.engine.engine")
after = state()
print([key for key in before if before[key] != after[key]])
"""


def test_importing_the_engine_changes_nothing():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO, logging.ERROR])
def test_quiet_leaves_logging_as_it_was(level, caplog):
    logging.disable(level)
    try:
        with startup.quiet():
            logging.getLogger("DeepSpeed").warning("no accelerator")
        assert logging.root.manager.disable == level
    finally:
        logging.disable(logging.NOTSET)
    assert not caplog.records


def test_deepspeed_is_as_it_was_after_a_start():
    from deepspeed.ops import __compatible_ops__ as compatible
    from deepspeed.runtime import compiler

    before, compile_kernel = dict(compatible), compiler.compile
    compatible["deepspeed_shm_comm"] = True
    try:
        with startup.without_host_kernels():
            assert compatible["deepspeed_shm_comm"] is False
        assert compatible["deepspeed_shm_comm"] is True
    finally:
        compatible["deepspeed_shm_comm"] = before["deepspeed_shm_comm"]
    startup.import_muon()
    assert compiler.compile is compile_kernel


def test_muon_is_imported_uncompiled():
    script = (
        "import deepspeed; from ds_tokimg.engine.startup import import_muon; import_muon();"
        "from deepspeed.runtime.zero.muon import original_muon as muon; import sys;"
        "print(muon.zeropower_via_newtonschulz5.__module__, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split()[-2:] == ["deepspeed.runtime.zero.muon.original_muon", "False"]
