"""--profile: the trace and the table of a run. Memory that is kept: no page faults once a step has run."""

import json
import subprocess
import sys

import pytest

from tests.support.runs import small_flags, train_in_ranks, write_corpus


def test_a_profiled_run_leaves_a_trace_and_prints_the_top_operators(tmp_path):
    corpus = write_corpus(tmp_path)
    flags = small_flags(corpus, tmp_path / "run", "--profile", 2, "--max_steps", 6, "--cache_dir", tmp_path / "cache")
    printed = train_in_ranks(1, flags)
    assert "aten::mm" in printed and "Self CPU" in printed and "profile of 2 steps" in printed
    events = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
    assert len(steps) == 2


FAULTS = """
import resource, sys
from ds_tokimg.engine.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
import torch

def faults(numbers):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(40_000_000)  # the heap grows once
print(faults(10_000_000))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept():
    def faults(mode: str) -> list[str]:
        command = [sys.executable, "-c", FAULTS, mode]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    accepted, kept = faults("keep")
    if accepted == "False":
        pytest.skip("another C library")
    assert int(kept) < 100 < int(faults("leave")[0])
