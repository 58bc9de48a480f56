"""The launchers above a rank: whether one of them is gone, so that the rank would go on unseen."""

from __future__ import annotations

import os

import psutil

# Words of a launcher's command line, as a program or as a module of Python.
NAMES = ("deepspeed", "torchrun", "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run")
# The scripts of launch/ hand their process number on in this.
SCRIPT = "DS_TOKIMG_SCRIPT"


class Launchers:
    """The processes between this one and its outermost launcher, none where it was not started by one.

    A plain `python` outlives the shell that started it, as `nohup` and `&` promise.
    """

    def __init__(self) -> None:
        self._links: list[tuple[psutil.Process, int]] = []  # a process and its parent's number
        self._orphaned = False
        if "LOCAL_RANK" in os.environ:
            self._links = _links_to_launcher()
            script = os.environ.get(SCRIPT)  # it may have been killed before this process began to look
            self._orphaned = script is not None and script not in {str(parent) for _, parent in self._links}

    def __len__(self) -> int:
        return len(self._links)

    def gone(self) -> bool:
        """Whether a launcher has ended: a process below it has another parent now."""
        if self._orphaned:
            return True
        try:
            return any(process.ppid() != parent for process, parent in self._links)
        except psutil.NoSuchProcess:
            return True


def _links_to_launcher() -> list[tuple[psutil.Process, int]]:
    links, outermost = [], 0
    child = psutil.Process()
    for parent in child.parents():
        links.append((child, parent.pid))
        if is_launcher(parent):
            outermost = len(links)
        child = parent
    return links[:outermost]


def is_launcher(process: psutil.Process) -> bool:
    """One of our scripts; or of DeepSpeed or torchrun, by the first words of its command line."""
    if str(process.pid) == os.environ.get(SCRIPT):
        return True
    try:
        words = process.cmdline()[:5]
    except psutil.Error:
        return False
    return any(os.path.basename(word) in NAMES for word in words)
