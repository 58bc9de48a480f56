"""What can be wrong with a file: torn, foreign, lying. Each is a function that does it to a file."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_tokimg.settings.manifest import MANIFEST, checksums, entries_of, write_manifest


class Harmful:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _terabytes(path: Path) -> None:
    """The header of a safetensors file whose tensor would fill four terabytes."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def _endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}" + bytes(64))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "a bit flipped": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a list": lambda path: path.write_text("[1, 2]"),
    "an empty object": lambda path: path.write_text("{}"),
    "null": lambda path: path.write_text("null"),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
    "deep": lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "a long number": lambda path: path.write_text('{"format": ' + "9" * 10_000 + "}"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Harmful(path.parent / "unpickled"))),
    "terabytes": _terabytes,
    "an endless header": _endless_header,
    "a link to another file": lambda path: _link(path, "/etc/passwd"),
    "a link to itself": lambda path: _link(path, path.name),
    "a folder": _folder,
}


def seal_again(folder: Path) -> None:
    """Have the manifest agree with what the files are now, as somebody would who changes them on purpose."""
    names = [name for name in entries_of(folder) if name != MANIFEST and (folder / name).is_file()]
    write_manifest(folder, checksums(folder, names))


STRANGE = (-1, 10**13, 10**30, float("nan"), "x", None, True, [], [1, "a"], {"a": [{}]})


def strange_values(content: dict) -> Iterator[tuple[str, dict]]:
    """Copies of a JSON object, each with one value, at any depth, in another's place or left out; and where it is."""
    for place in _places(content):
        for value in STRANGE:
            yield f"{'.'.join(map(str, place))} = {value!r}"[:80], _with(content, place, value)


def _places(content, before: tuple = ()) -> Iterator[tuple]:
    keys = content.keys() if isinstance(content, dict) else range(min(len(content), 1))
    for key in keys:
        yield (*before, key)
        if isinstance(content[key], dict | list):
            yield from _places(content[key], (*before, key))


def _with(content: dict, place: tuple, value) -> dict:
    changed = copy.deepcopy(content)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed
