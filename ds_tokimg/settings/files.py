"""Files and folders that are replaced in one go: a process that is killed while it writes a file leaves the old one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_text(path: str | Path, text: str, end: str = "\n") -> None:
    """Replace a file by one that holds `text` and `end`, and is on the disk when this returns."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text + end)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Replace a folder of files by what `write` puts into an empty one. Killed in between, there may be none."""
    new = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir()
    write(new)
    for path in new.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(new)
    if folder.is_dir():
        os.rename(folder, old)
    os.rename(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def runs_around(checkpoint: Path) -> list[Path]:
    """The folders of runs that a checkpoint may lie in, however it is named: `.`, its bare name, a link."""
    named = [Path(os.path.abspath(checkpoint)), Path(os.path.realpath(checkpoint))]
    return [path.parent.parent for path in named if path.parent.name == "checkpoints"]
