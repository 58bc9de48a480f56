"""The checksums of a folder's files: written when all of them are there, compared before any of them is believed.

`manifest.json` holds the size and the CRC-32 of each file. That tells damage, not intent: whoever changes a file on
purpose can write its checksum too, so what is read is checked all the same.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ds_tokimg.errors import UserError, value_problems
from ds_tokimg.settings.files import write_text
from ds_tokimg.settings.formats import read_object

MANIFEST = "manifest.json"
_ENTRY = {"size": int, "crc32": int}
_CHUNK = 16 * 2**20  # bytes read at once for a checksum


def files_in(folder: Path) -> list[str]:
    """The names of all files below a folder, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def checksums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Size and checksum of files, which are on the disk when it returns."""
    entries = {}
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        entries[name] = {"size": (folder / name).stat().st_size, "crc32": _crc32(folder / name)}
    return entries


def write_manifest(folder: Path, entries: dict[str, dict[str, int]]) -> None:
    """The last file that is written to a folder."""
    write_text(folder / MANIFEST, json.dumps({"files": dict(sorted(entries.items()))}, indent=1))


def entries_of(folder: Path) -> dict[str, dict[str, int]]:
    """What the manifest says of each file. UserError where there is none, or none that can be read."""
    path = folder / MANIFEST
    files = read_object(path).get("files")
    if not isinstance(files, dict):
        raise UserError(f'{path}: expected an object "files"')
    for name, entry in files.items():
        if not isinstance(entry, dict) or value_problems(entry, _ENTRY):
            raise UserError(f"{path}: expected size and crc32 of {name!r}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path}: {name!r} is a file outside of the folder")
    return files


def verify(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a folder's files (or with its files `names`), or None: every byte is compared."""
    try:
        files = entries_of(folder)
    except UserError as mistake:
        return f"it has no readable {MANIFEST}, so it was never finished ({mistake})"
    for name in files if names is None else names:
        path = folder / name
        if name not in files or not path.is_file():
            return f"{name} is missing"
        try:
            size, checksum = path.stat().st_size, _crc32(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != files[name]["size"]:
            return f"{name} has {size} bytes, {files[name]['size']} were written"
        if checksum != files[name]["crc32"]:
            return f"{name} is not what was written (its checksum differs)"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
