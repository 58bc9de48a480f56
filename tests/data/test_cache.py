"""A sealed folder: every kind of damage is found when it is opened, and what is whole opens."""

import json
import os
import shutil

import pytest

from ds_tokimg.data import cache
from ds_tokimg.data.cache import MANIFEST, DamagedCache, check, seal


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A sealed folder with a small file, an empty one, and one of ten blocks."""
    monkeypatch.setattr(cache, "_BLOCK", 1000)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "small").write_bytes(b"small")
    (folder / "empty").write_bytes(b"")
    (folder / "large").write_bytes(os.urandom(9500))
    seal(folder, ["a line"])
    return folder


def overwrite(path, place: int, data: bytes, keep_time: bool = False) -> None:
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_whole_folder_opens_and_tells(folder):
    assert check(folder) == ["a line"] == check(folder)


def flip(path, place: int) -> None:
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: os.truncate(f / "large", 9499),
        lambda f: os.truncate(f / "large", 0),
        lambda f: (f / "large").unlink(),
        lambda f: overwrite(f / "large", 0, bytes(9500)),
        lambda f: overwrite(f / "large", 4096, bytes(512)),
        lambda f: flip(f / "large", 5555),
        lambda f: flip(f / "small", 2),
        lambda f: overwrite(f / "empty", 0, b"x"),
        lambda f: overwrite(f / "large", 0, bytes(9500), keep_time=True),
        lambda f: overwrite(f / "large", 3000, bytes(6500), keep_time=True),
        lambda f: overwrite(f / "small", 0, b"SMALL", keep_time=True),
        lambda f: (f / MANIFEST).unlink(),
        lambda f: os.truncate(f / MANIFEST, 10),
        lambda f: (f / MANIFEST).write_bytes(bytes(300)),
        lambda f: (f / MANIFEST).write_text("[]"),
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace("a line", "a lime")),
        lambda f: shutil.rmtree(f),
    ],
)
def test_damage_is_found(folder, harm):
    harm(folder)
    with pytest.raises(DamagedCache, match=folder.name):
        check(folder)


def test_a_copied_folder_is_read_once(folder, tmp_path, monkeypatch):
    """Other time stamps: everything is compared, once."""
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    read = []
    whole = cache._checksums
    monkeypatch.setattr(cache, "_checksums", lambda file, blocks: read.extend(blocks) or whole(file, blocks))
    check(copy)
    assert len(read) == 10 + 1
    read.clear()
    check(copy)
    assert len(read) == cache._SAMPLED + 1


def test_the_seal_is_on_the_disk_before_it_is_told(folder, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(cache, "sync", lambda path: synced.append(path.name))
    (folder / MANIFEST).unlink()
    seal(folder, [])
    assert set(synced) == {"small", "empty", "large", MANIFEST, "cache"} and synced[-1] == "cache"
    assert json.loads((folder / MANIFEST).read_text())["files"]["empty"]["size"] == 0
