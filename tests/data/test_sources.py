"""What a data path means: several with weights, folders with other files, cloned repositories, hub data sets."""

import json
import re

import pytest

from ds_tokimg.data.records import ReadOptions
from ds_tokimg.data.sources import find, find_all, split_of
from ds_tokimg.errors import UserError


def texts(source) -> list[str]:
    return [record for group in range(len(source.groups)) for record in source.read(group)]


def write(path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# ---- several paths ----


def test_weights_of_paths(tmp_path, monkeypatch):
    a, b = write(tmp_path / "a.txt", "a"), write(tmp_path / "b" / "b.txt", "b")
    sources = find_all([f"{a}:0.7", f"{b.parent}/:.3"])
    assert [(texts(source), source.weight) for source in sources] == [(["a"], 0.7), (["b"], 0.3)]
    assert [source.weight for source in find_all([a, str(b)])] == [None, None]
    assert [source.weight for source in find_all(str(a))] == [None]
    odd = write(tmp_path / "odd:2", "x").rename(tmp_path / "odd.txt:2")
    with pytest.raises(UserError, match="cannot read"):
        find_all([str(odd)])  # a file that is really called so, with a suffix that says nothing


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (["a.txt:0.5", "b.txt"], r"some data paths have a weight and others have none \(b\.txt\)"),
        (["a.txt:0"], "the weight must be above 0"),
        ([], "no data path"),
        (["a.txt:1", "missing.txt:1"], r"no such file or folder: missing\.txt"),
    ],
)
def test_weights_that_mean_nothing(tmp_path, monkeypatch, paths, problem):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.txt", "b")
    with pytest.raises(UserError, match=problem):
        find_all(paths)


# ---- folders ----


def test_what_is_left_out_of_a_folder_is_listed(tmp_path):
    write(tmp_path / "a.txt", "text")
    for i in range(3):
        write(tmp_path / "deep" / f"{i}.zip", "")
    for name in ("README.txt", "LICENSE", "script.py", "Makefile", "state.json", ".hidden.pdf", ".git/config"):
        write(tmp_path / name, "")
    source = find(tmp_path)
    assert texts(source) == ["text"]
    (note,) = source.notes
    assert note.startswith(f"{tmp_path}: not read: 3 .zip (deep/0.zip, …), 2 without suffix (LICENSE, …)")
    for listed in ("1 .txt (README.txt)", "1 .py (script.py)", "1 .json (state.json)"):
        assert listed in note
    assert "hidden" not in note and ".git" not in note


def test_a_readme_is_read_where_it_is_named(tmp_path):
    assert texts(find(write(tmp_path / "README.txt", "text"))) == ["text"]


def test_compressed_shards_are_read_beside_a_readme(tmp_path):
    import gzip

    write(tmp_path / "README.txt", "not this")
    for i in range(100):
        (tmp_path / f"{i:03}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": f"shard {i}"}).encode()))
    source = find(tmp_path)
    assert texts(source) == [f"shard {i}" for i in range(100)]
    assert source.notes == [f"{tmp_path}: not read: 1 .txt (README.txt)"]


def test_a_folder_without_texts_says_what_it_holds(tmp_path):
    write(tmp_path / "a.zip", "")
    with pytest.raises(UserError, match=r"holds no text: \.txt, .*; it holds 1 \.zip \(a\.zip\)"):
        find(tmp_path)


# ---- repositories ----


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("validation.jsonl.gz", "validation"),
        ("valid/x.txt", "validation"),
        ("en.dev.txt", "validation"),
        ("TEST.txt", "test"),
        ("test_0.txt", "test"),
        ("train/test.txt", "train"),
        ("latest.txt", None),
        ("training day.txt", "train"),
        ("constraint.txt", None),
        ("a.txt", None),
    ],
)
def test_split_of_a_path(tmp_path, path, split):
    assert split_of((tmp_path / path).relative_to(tmp_path)) == split


def repository(folder):
    write(folder / "README.md", "# a data set")
    for split in ("test", "train", "validation"):
        for i in range(2):
            write(folder / "data" / f"{split}-{i:05}-of-00002.jsonl", json.dumps({"text": f"{split} {i}"}))
    write(folder / "extra.jsonl", '"extra"')
    return folder


def test_a_cloned_repository_keeps_its_splits(tmp_path):
    source = find(repository(tmp_path))
    assert texts(source) == ["train 0", "train 1"]
    assert texts(source.validation) == ["validation 0", "validation 1"]
    notes = "\n".join(source.notes)
    assert "not read: 1 .md (README.md)" in notes
    assert "trains on its train split (2 .jsonl (data/train-00000-of-00002.jsonl, …))" in notes
    assert "its validation split is used for validation (2 .jsonl" in notes
    assert re.search(r"neither trained nor validated on: 3 \.jsonl \(data/test-00000", notes)


def test_files_named_for_tests_are_texts_where_nothing_is_named_for_training(tmp_path):
    write(tmp_path / "test.txt", "one")
    write(tmp_path / "val.txt", "two")
    write(tmp_path / "z.txt", "three")
    assert texts(find(tmp_path)) == ["one", "two", "three"] and find(tmp_path).validation is None


def test_a_train_split_alone_hides_nothing(tmp_path):
    write(tmp_path / "train.txt", "one")
    write(tmp_path / "more.txt", "two")
    assert texts(find(tmp_path)) == ["two", "one"] and find(tmp_path).notes == []


def test_a_test_split_is_not_used_for_validation(tmp_path):
    write(tmp_path / "train.txt", "one")
    write(tmp_path / "test.txt", "two")
    source = find(tmp_path)
    assert texts(source) == ["one"] and source.validation is None


# ---- the hub ----


def test_splits_of_a_hub_data_set(monkeypatch):
    import datasets

    splits = {name: datasets.Dataset.from_dict({"body": [name] * 3}) for name in ("test", "dev", "train")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    source = find("owner/name", ReadOptions(text_key="body"))
    assert texts(source) == ["train"] * 3 and texts(source.validation) == ["dev"] * 3
    assert source.notes == [
        "owner/name: its split 'dev' (3 rows) is used for validation",
        "owner/name: neither trained nor validated on: the splits test",
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"test": splits["test"]})
    with pytest.raises(UserError, match="the data set owner/name has no train split; it has test"):
        find("owner/name")
