"""A cache's folder that is whole or not there: sealed when it is written, checked when it is opened.

The seal (`manifest.json`) holds the size, the time stamp and checksums of every file. A file of up to 64 MB is read and
compared at every opening; of a larger one four blocks are, or all of it when its time stamp is another than that of
the seal (it was copied, or written to). Nothing else needs to be read, so that opening does not grow with the corpus.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_BLOCK = 16 << 20
_SAMPLED = 4


class DamagedCache(Exception):
    """A cache that is not what was sealed; says which file, and what is wrong with it."""


def seal(folder: Path, told: Any) -> None:
    """Writes the manifest of a complete folder, with what is worth telling again (JSON), and all of it to the disk."""
    files = {file.name: _stamp(file) for file in sorted(folder.iterdir())}
    manifest: dict[str, Any] = {"files": files, "told": told}
    manifest["checksum"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync(path)


def sync(path: Path) -> None:
    """Has a file, or the entries of a folder, on the disk before it returns, where the system can."""
    with contextlib.suppress(OSError):  # folders cannot be synchronised everywhere
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check(folder: Path) -> Any:
    """What was told when the folder was sealed. Raises DamagedCache."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
        if checksum != _checksum(manifest):
            raise ValueError("it was changed")
        files, told = manifest["files"], manifest["told"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCache(f"{folder / MANIFEST}: {error}") from None
    for name, stamp in files.items():
        _check_file(folder / name, stamp)
    return told


def _checksum(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _stamp(file: Path) -> dict[str, Any]:
    status = file.stat()
    blocks = range(-(-status.st_size // _BLOCK))
    return {"size": status.st_size, "time": status.st_mtime_ns, "checksums": _checksums(file, blocks)}


def _checksums(file: Path, blocks: Iterable[int]) -> list[int]:
    """CRC-32 of some blocks of a file, by their numbers."""
    sums = []
    with open(file, "rb") as stream:
        for block in blocks:
            stream.seek(block * _BLOCK)
            sums.append(zlib.crc32(stream.read(_BLOCK)))
    return sums


def _check_file(file: Path, stamp: dict[str, Any]) -> None:
    try:
        status = file.stat()
        if status.st_size != stamp["size"]:
            raise DamagedCache(f"{file}: {status.st_size:,} bytes in place of {stamp['size']:,}")
        count, as_sealed = len(stamp["checksums"]), status.st_mtime_ns == stamp["time"]
        all_of_it = count <= _SAMPLED or not as_sealed
        blocks = range(count) if all_of_it else sorted({(count - 1) * i // (_SAMPLED - 1) for i in range(_SAMPLED)})
        for block, checksum in zip(blocks, _checksums(file, blocks), strict=True):
            if checksum != stamp["checksums"][block]:
                raise DamagedCache(f"{file}: its content has changed")
    except OSError as error:
        raise DamagedCache(f"{file}: {error.strerror or error}") from None
    if not as_sealed:
        with contextlib.suppress(OSError):  # so that the next opening need not read all of it again
            os.utime(file, ns=(status.st_atime_ns, stamp["time"]))
