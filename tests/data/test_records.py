"""Reading of records: every format, cut anywhere, and the message for each kind of bad record."""

import json
import re
import socket

import pyarrow as pa
import pytest
from pyarrow import parquet

from ds_tokimg.data import files
from ds_tokimg.data.readers import read_span
from ds_tokimg.data.records import AS_USUAL, ReadOptions, Tally
from ds_tokimg.data.sources import find
from ds_tokimg.errors import UserError


def read(path, tally=None, **options) -> list:
    source = find(path, ReadOptions(**options))
    return [record for group in range(len(source.groups)) for record in source.read(group, tally)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_table(path, rows, row_group_size=None):
    columns = {name: [row.get(name) for row in rows] for name in {key for row in rows for key in row}}
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


MIXED = ["plain", {"text": "a text", "source": "x"}, {"prompt": "q", "answer": "a", "id": 3}]
MIXED_RECORDS = ["plain", "a text", ("q", "a")]


# ---- formats ----


def test_txt_is_one_text_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\n  two \r\n \t\nthree\u2028still three\x0c.\nlast")
    assert read(path) == ["one", "  two ", "three\u2028still three\x0c.", "last"]


def test_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo\n")) == ["one", "two"]
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf"one"\n')) == ["one"]
    assert read(write(tmp_path / "a.json", b'\xef\xbb\xbf{"text": "one"}')) == ["one"]


def test_jsonl_mixes_all_kinds_of_records(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, MIXED)) + "\n\n")
    assert read(path) == MIXED_RECORDS


def test_json_is_a_list_or_one_object(tmp_path):
    assert read(write(tmp_path / "a.json", json.dumps(MIXED, indent=2))) == MIXED_RECORDS
    assert read(write(tmp_path / "b.json", json.dumps(MIXED[2]))) == [("q", "a")]
    assert read(write(tmp_path / "c.json", '"plain"')) == ["plain"]


def test_parquet_may_mix_kinds_in_columns_with_nulls(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1)
    rows = [{"text": "a text"}, {"prompt": "q", "answer": "a"}, {"other": 1}] * 5
    path = write_table(tmp_path / "a.parquet", rows, row_group_size=4)
    assert len(find(path).groups) == 4
    assert read(path) == ["a text", ("q", "a")] * 5


def test_blank_records_are_left_out(tmp_path):
    rows = ["", " ", {"text": "\n"}, {"prompt": "q", "answer": ""}, {"prompt": "", "answer": "a"}, "x"]
    assert read(write(tmp_path / "a.json", json.dumps(rows))) == [("", "a"), "x"]


def test_folder_is_read_sorted_and_deep_without_hidden_or_other_files(tmp_path):
    write(tmp_path / "b.txt", "3\n")
    write(tmp_path / "a" / "z.jsonl", '"2"\n')
    write(tmp_path / "a" / "deep" / "x.json", '["1"]')
    write(tmp_path / "README.md", "no\n")
    write(tmp_path / "c.zip", "no\n")
    write(tmp_path / ".hidden" / "c.txt", "no\n")
    write(tmp_path / ".c.txt", "no\n")
    write_table(tmp_path / "c.parquet", [{"text": "4"}])
    assert read(tmp_path) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_spans_cut_a_file_anywhere_without_loss(tmp_path, monkeypatch, size):
    lines = ["é" * n for n in range(1, 20)] + ["a", "b\r", "end"]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    whole = read(path)
    monkeypatch.setattr(files, "BLOCK_BYTES", size)
    assert len(find(path).groups) > 1
    assert read(path) == whole == [line.rstrip("\r") for line in lines]


def test_small_files_share_a_group(tmp_path):
    for i in range(50):
        write(tmp_path / f"{i:02}.txt", f"text {i}\n")
    assert len(find(tmp_path).groups) == 1
    assert read(tmp_path) == [f"text {i}" for i in range(50)]


def test_fingerprint_follows_the_files(tmp_path):
    path = write(tmp_path / "a.txt", "one\n")
    before = find(tmp_path).fingerprint
    assert find(tmp_path).fingerprint == before
    write(tmp_path / "b.txt", "two\n")
    with_second = find(tmp_path).fingerprint
    path.write_text("one and more\n")
    assert len({before, with_second, find(tmp_path).fingerprint}) == 3


# ---- a hub data set ----


def test_hub_data_set(monkeypatch, tmp_path):
    import datasets

    asked = []
    rows = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(4500)], "id": range(4500)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or {"train": rows})
    assert read("owner/name:config") == rows["text"][:]
    assert asked == [(("owner/name", "config"), {})]


def test_hub_data_set_that_cannot_be_loaded_or_used(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"'owner/name' is no file or folder here.*no route"):
        find("owner/name")
    rows = datasets.Dataset.from_dict({"content": ["x"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows})
    with pytest.raises(UserError, match='columns content; it needs "text"'):
        find("owner/name")


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/folder", "~/missing", "a/b/c"])
def test_missing_paths_are_not_looked_up_on_the_network(name, monkeypatch):
    def no_network(*_):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(UserError, match=re.escape(f"no such file or folder: {name}")):
        find(name)


# ---- bad input ----


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("3", "this one is a number"),
        ("null", "this one is null"),
        ('["a"]', "this one is a list"),
        ('{"content": "x", "id": 1}', "this one has the keys: 'content', 'id'"),
        ("{}", "has the keys: none"),
        ('{"prompt": "q"}', 'has "prompt" but no "answer"'),
        ('{"answer": "a", "prompt": null}', 'has "answer" but no "prompt"'),
        ('{"text": ["a", "b"]}', '"text" must be a string, not a list'),
        ('{"prompt": "q", "answer": 3}', '"answer" must be a string, not a number'),
        ('{"text": "t", "answer": "a"}', 'has both "text" and "answer"'),
        (r'{"text": "half \ud83d of a pair"}', "not a valid character"),
    ],
)
def test_bad_records_name_file_line_and_problem(tmp_path, record, problem):
    lines = ['"fine"', "", '{"text": "fine"}', record, '"fine"']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(UserError, match=re.escape(f"{path}, line 4: ") + ".*" + re.escape(problem)):
        read(path)
    path = write(tmp_path / "b.json", f'[\n\n"fine", {{"text":\n"[fine, \\"]"}},\n {record},\n"fine"]')
    with pytest.raises(UserError, match=re.escape(f"{path}, line 5: ") + ".*" + re.escape(problem)):
        read(path)


def test_line_numbers_are_right_in_later_spans(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '"é"\n' * 40 + "oops\n" + '"x"\n' * 3)
    monkeypatch.setattr(files, "BLOCK_BYTES", 16)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 41: invalid JSON: Expecting value (column 1)")):
        read(path)


def test_invalid_json_names_the_place(tmp_path):
    path = write(tmp_path / "a.json", '[\n{"text": "x"},\n{"text": }\n]')
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3: invalid JSON: Expecting value (column 10)")):
        read(path)


def test_json_may_be_one_object_a_line(tmp_path):
    path = write(tmp_path / "b.json", '{"text": "x"}\n{"text": "y"}\n')
    assert read(path) == ["x", "y"]
    with pytest.raises(UserError, match=r"b\.json, line 3: invalid JSON"):
        read(write(path, '{"text": "x"}\n{"text": "y"}\n{"text": \n'))


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    path = write(tmp_path / "a.txt", "fine\nö\n".encode() + b"caf\xe9\nfine\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3: not UTF-8 text (byte 0xe9)") + ".*iconv"):
        read(path)


def test_bad_parquet(tmp_path):
    with pytest.raises(UserError, match="not a readable parquet file"):
        read(write(tmp_path / "a.parquet", b"PAR1 nothing"))
    with pytest.raises(UserError, match="has the columns body; it needs"):
        read(write_table(tmp_path / "b.parquet", [{"body": "x"}]))
    path = write_table(tmp_path / "d.parquet", [{"text": f"text {i}" * 9} for i in range(500)])
    content = bytearray(path.read_bytes())
    content[60:900] = bytes(840)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.parquet: not a readable parquet file"):
        read(path)
    path = write_table(tmp_path / "c.parquet", [{"text": "x"}] * 7 + [{"text": "x", "answer": "y"}], 3)
    with pytest.raises(UserError, match=r"c.parquet, row 8: has both"):
        read(path)


def test_unknown_format_and_folder_without_texts(tmp_path):
    for name, suffix in (("a.zip", ".zip"), ("a.parquet.gz", ".gz"), ("a", "a file without suffix")):
        with pytest.raises(UserError, match=rf"cannot read '{re.escape(suffix)}'; use \.txt, \.md, \.json"):
            read(write(tmp_path / name, "x"))
    with pytest.raises(UserError, match=r"holds no text: .*; it holds 1 without suffix \(a\), 1 \.gz"):
        find(tmp_path)


def test_empty_files_have_no_records(tmp_path):
    for name in ("a.txt", "b.json", "c.jsonl"):
        assert read(write(tmp_path / name, "")) == []
    assert list(read_span(files.Span(str(tmp_path / "a.txt"), 0, 0), AS_USUAL, Tally())) == []
