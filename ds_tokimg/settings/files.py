"""Files and folders that are replaced in one go: a process that is killed while it writes a file leaves the old one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ds_tokimg.errors import UserError


def absolute(place: str) -> str:
    """The absolute form of a path that exists, also before the weight in `PATH:WEIGHT`; anything else as it is."""
    path, colon, weight = place.rpartition(":")
    if os.path.exists(place) or not weight.replace(".", "", 1).isdecimal():
        path, colon, weight = place, "", ""
    return os.path.abspath(path) + colon + weight if os.path.exists(path) else place


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


def file_of(folder: Path, name: str) -> Path:
    """A file that belongs to a checkpoint or an export: in it, or in the run around it; where it would be, if there is
    none."""
    places = [folder / name, *(run / name for run in runs_around(folder))]
    return next((place for place in places if place.is_file()), places[0])


# ---- whether something can be written, asked before the work that is to be written is done ----


def check_file(flag: str, file: str | Path) -> None:
    """Raise a UserError that names the flag where a file cannot be written; leave everything as it is."""
    path = Path(os.path.realpath(file))  # of a link what it leads to
    problem = _folder_problem(path.parent) if path.parent.is_dir() else f"there is no folder {Path(file).parent}"
    if path.is_dir():
        problem = "it is a folder: name a file in it"
    elif path.exists():
        problem = None if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
    if problem:
        raise UserError(f"{flag} {file} cannot be written: {problem}")


def check_folder(flag: str, folder: str | Path, empty: bool = False) -> None:
    """Raise a UserError that names the flag where no files can be written into a folder, which need not exist yet;
    leave everything as it is. empty: it may hold nothing either."""
    path = Path(os.path.realpath(folder))
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if os.path.islink(folder) and there != path:
        problem: str | None = f"it is a link to {path}, which is not there"
    elif not there.is_dir():
        problem = f"{there} is no folder"
    elif empty and there == path and any(path.iterdir()):
        raise UserError(f"{flag} {folder} exists and is not empty: choose another folder")
    else:
        problem = _folder_problem(there)
    if problem:
        raise UserError(f"{flag} {folder} cannot be written: {problem}")


def _folder_problem(folder: Path) -> str | None:
    """Why no file can be made in a folder that exists; None where one was, which is gone again."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)
