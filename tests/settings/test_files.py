"""Whether something can be written is said before the work is done, and asking leaves nothing behind."""

import os

import pytest

from ds_tokimg.errors import UserError
from ds_tokimg.settings.files import absolute, check_file, check_folder


@pytest.fixture
def place(tmp_path):
    """A folder with a file, a link to nowhere, a link to a folder and one to a file."""
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_nowhere").symlink_to(tmp_path / "gone" / "deeper")
    (tmp_path / "to_folder").symlink_to(tmp_path / "folder")
    (tmp_path / "to_file").symlink_to(tmp_path / "file")
    return tmp_path


def test_absolute_paths(place, monkeypatch):
    """What exists, with or without a weight; names of data sets stay, also beside a folder of that name."""
    monkeypatch.chdir(place / "folder")
    assert absolute("../file") == absolute("./../file") == str(place / "file")
    assert absolute("../file:0.7") == f"{place}/file:0.7" and absolute("../to_file:2") == f"{place}/to_file:2"
    (place / "folder" / "a:2").write_text("")
    assert absolute("a:2") == f"{place}/folder/a:2"
    (place / "folder" / "owner" / "name").mkdir(parents=True)
    for name in ("owner/name:english", "none.txt", "none.txt:0.7", "owner/other", ""):
        assert absolute(name) == name


def everything(folder) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["file", "new.json", "to_file", "folder/new", "to_folder/new", "./folder/../new"])
def test_a_file_that_can_be_written(place, name):
    before = everything(place)
    check_file("--json", place / name)
    assert everything(place) == before and (place / "file").read_text() == "as it was"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("folder", "it is a folder"),
        ("to_folder", "it is a folder"),
        (".", "it is a folder"),
        ("none/new.json", "there is no folder"),
        ("file/new.json", "there is no folder"),
        ("to_nowhere", "there is no folder"),
    ],
)
def test_a_file_that_cannot(place, name, problem):
    before = everything(place)
    with pytest.raises(UserError, match=f"^--json .* cannot be written: {problem}"):
        check_file("--json", place / name)
    assert everything(place) == before


@pytest.mark.parametrize("name", [".", "folder", "to_folder", "new/and/deeper", "to_folder/new"])
def test_a_folder_that_can_be_written(place, name):
    before = everything(place)
    check_folder("--output", place / name, empty=name not in (".",))
    assert everything(place) == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "cannot be written: .*file is no folder"),
        ("to_file/new", "cannot be written: .*file is no folder"),
        ("full", "exists and is not empty"),
        ("to_nowhere", "cannot be written: it is a link to .*deeper, which is not there"),
    ],
)
def test_a_folder_that_cannot(place, name, problem):
    with pytest.raises(UserError, match=f"^--output .* {problem}"):
        check_folder("--output", place / name, empty=True)


def test_what_may_only_be_read(tmp_path):
    """/proc takes no files, whoever asks."""
    for check, name in ((check_file, "/proc/new.json"), (check_folder, "/proc/new"), (check_folder, "/proc")):
        with pytest.raises(UserError, match=f"{name} cannot be written"):
            check("--json", name)
    check_file("--json", os.devnull)
    assert list(tmp_path.iterdir()) == []
