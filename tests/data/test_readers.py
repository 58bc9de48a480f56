"""Reading of every format: packed and plain, cut into documents in three ways, damaged, and in other alphabets."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import time

import pyarrow as pa
import pytest
from pyarrow import parquet

from ds_tokimg.data import files
from ds_tokimg.data.files import format_of
from ds_tokimg.data.records import Conversation, ReadOptions, Tally
from ds_tokimg.data.sources import find
from ds_tokimg.errors import UserError


def read(path, tally=None, **options) -> list:
    source = find(path, ReadOptions(**options))
    return [record for group in range(len(source.groups)) for record in source.read(group, tally)]


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def pack(suffix: str, data: bytes) -> bytes:
    return PACKERS[suffix](data)


# ---- packed files ----


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_read_as_their_content(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    lines = [f"line {i} " + "é" * (i % 70) for i in range(500)]
    contents = {
        ".txt": ("\n".join(lines), lines),
        ".JSONL": ("\n".join(json.dumps({"text": line}) for line in lines), lines),
        ".json": (json.dumps(lines), lines),
        ".csv": ("text\n" + "\n".join(lines), lines),
        ".md": ("# Title\n\nwords\n", ["# Title\n\nwords"]),
    }
    for kind, (content, expected) in contents.items():
        path = tmp_path / f"a{kind}{suffix.upper() if kind == '.md' else suffix}"
        path.write_bytes(pack(suffix, content.encode()))
        assert read(path) == expected, path


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_of_several_members_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(suffix, b"one\ntw") + pack(suffix, b"o\nthree\n"))
    assert read(path) == ["one", "two", "three"]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "overwritten", "no such format"])
def test_damaged_packed_files_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    packed = bytearray(pack(suffix, "".join(f"{i * i}\n" for i in range(20_000)).encode()))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    elif damage == "overwritten":
        packed[len(packed) // 2 : len(packed) // 2 + 300] = bytes(300)
    else:
        packed = b"plain text"
    path.write_bytes(packed)
    with pytest.raises(UserError, match=re.escape(f"cannot read {path}: not a whole ")):
        read(path)


def test_line_numbers_in_packed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'"fine"\n' * 100 + b"oops\n"))
    with pytest.raises(UserError, match=re.escape(f"{path}, line 101: invalid JSON")):
        read(path)


def test_formats_from_names():
    assert format_of("a.JSONL.GZ") == (".jsonl", "gzip")
    assert format_of("corpus.v1.0.txt") == (".txt", None)
    assert format_of("a.b/shard.tsv.zst") == (".tsv", "zstd")
    for name in ("a", "a.gz", "a.parquet.gz", "a.zip", "txt", ".txt.tar", "a.jpg.gz"):
        assert format_of(name) == ("", None), name


# ---- documents of plain text files ----

BOOK = "A title\n\nThe first paragraph\r\nis wrapped here\nand there.\n \t\n\nThe second\none.\n"
PARAGRAPHS = ["A title", "The first paragraph\nis wrapped here\nand there.", "The second\none."]


def test_documents_by_line_paragraph_and_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(BOOK.encode())
    assert read(path) == read(path, document="line")
    assert len(read(path)) == 6
    assert read(path, document="paragraph") == PARAGRAPHS
    assert read(path, document="file") == [BOOK.replace("\r", "").rstrip("\n")]
    markdown = path.rename(tmp_path / "book.MD")
    assert read(markdown) == read(markdown, document="file") and len(read(markdown, document="line")) == 6
    with pytest.raises(UserError, match="unknown document 'page'; available: line, paragraph, file"):
        read(markdown, document="page")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 40, 500])
def test_spans_cut_paragraphs_anywhere_without_loss(tmp_path, monkeypatch, size):
    path = tmp_path / "book.txt"
    text = f"{BOOK}\n" * 3 + "\n\n" + "\n".join("é" * n for n in range(9)) + "\n\nlast"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = read(path, document="paragraph")
    assert len(whole) == 11 and whole[:3] == PARAGRAPHS and whole[-1] == "last"
    monkeypatch.setattr(files, "BLOCK_BYTES", size)
    assert read(path, document="paragraph") == whole


def test_wrapped_lines_are_noticed(tmp_path):
    path = tmp_path / "book.txt"
    words = "the cat sat on a mat and the dog ran to the old house by the sea where it slept".split()
    path.write_text("".join(" ".join(words[i % 9 : i % 9 + 8]) + "\n" for i in range(1181)))
    tally = Tally()
    read(path, tally)
    (note,) = tally.notes("book.txt")
    assert "1,181 of 1,181 texts are lines of less than 80 characters" in note and "--document paragraph" in note
    for content in ("A sentence is short.\n" * 50, "a long line of text, " * 6 + "\n", "word\n" * 5):
        path.write_text(content)
        read(path, tally := Tally())
        assert tally.notes("book.txt") == [], content[:40]
    path.write_text("word word\nword\n\n" * 50)
    read(path, tally := Tally(), document="paragraph")
    assert tally.notes("book.txt") == []


# ---- one pass ----


def test_a_long_line_is_read_once(tmp_path, monkeypatch):
    """Bytes that are read from a file of one line, in spans: not the square of their number."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 12)
    path = tmp_path / "line.txt"
    path.write_bytes(b"word " * 200_000)
    read_bytes = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read_bytes.append(count)
            return count

    monkeypatch.setattr(files, "_unpacked", lambda path, _: io.BufferedReader(Counted(path), 1 << 9))
    for document in ("line", "paragraph"):
        read_bytes.clear()
        assert [len(text) for text in read(path, document=document)] == [1_000_000]
        assert sum(read_bytes) < 4 * 1_000_000, document


# ---- tables ----


def test_csv_and_tsv(tmp_path):
    rows = [("a, b", "x\ny"), ('say "hello"', "é"), ("", "no prompt"), ("no answer", "")]
    for name, dialect in (("a.csv", "excel"), ("B.TSV", "excel-tab")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, dialect)
            writer.writerow(("id", "prompt", "answer"))
            writer.writerows((i, *row) for i, row in enumerate(rows))
        assert read(tmp_path / name) == rows[:3]
        assert read(tmp_path / name, text_key="answer") == [answer for _, answer in rows[:3]]


def test_csv_may_mix_kinds_in_columns_with_empty_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,prompt,answer\nt,,\n,q,a\n\n,,\n")
    assert read(path) == ["t", ("q", "a")]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("a\n\nx,y,z\n", "line 4: 3 cells in a table of 1 columns"),
        ('a\n"broken" quote\n', "line 3: not readable as a table"),
        ('a\n"never\nclosed\n', "line 4: not readable as a table"),
        ("a\ncaf\xe9\n", "line 3: \"text\" holds '\\udce9', which is not a valid character"),
    ],
)
def test_bad_rows_of_csv(tmp_path, rows, problem):
    path = tmp_path / "a.csv"
    path.write_bytes(("text\n" + rows).encode("latin1"))
    with pytest.raises(UserError, match=re.escape(f"{path}, {problem}")):
        read(path)
    tally = Tally(skip_bad=True)
    assert read(path, tally) == ["a"] and tally.bad == 1


def test_a_table_without_texts_names_its_columns(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("id\tbody\n1\tx\n")
    with pytest.raises(UserError, match=r'a\.tsv has the columns id, body; it needs "text".*--text_key'):
        read(path)
    assert read(path, text_key="body") == ["x"]
    path.write_text("")
    assert read(path) == []


def test_arrow_files_of_both_forms(tmp_path):
    table = pa.table({"text": [f"t{i}" for i in range(3000)], "n": range(3000)})
    for number, writer in enumerate((pa.ipc.new_stream, pa.ipc.new_file)):
        path = tmp_path / f"{number}.arrow"
        with writer(str(path), table.schema) as out:
            out.write_table(table, 700)
        assert read(path) == table["text"].to_pylist()
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=r"1\.arrow: not a readable arrow file"):
        read(path)


def test_a_folder_saved_by_datasets(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["one", "two"]


# ---- other keys, conversations ----


def test_text_key_wins_over_other_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"body": "b", "text": "t", "prompt": "p"}, {"prompt": "q", "answer": "a"}, "plain", {"body": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, text_key="body") == ["b", ("q", "a"), "plain"]
    path.write_text('{"text": "t"}')
    with pytest.raises(UserError, match=r'line 1: a record is a string, {"body": ...}.*keys: \'text\''):
        read(path, text_key="body")


def test_conversations_of_lines_and_tables(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
    ]
    expected = Conversation((("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi.")))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "id": 1}))
    assert read(tmp_path / "a.jsonl") == [expected]
    parquet.write_table(pa.table({"messages": [messages, messages]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [expected, expected]
    assert (expected.prompt, expected.answer) == ("Be brief.\nHello", "Hi.")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", '"messages" must be a list'),
        (["hello"], '"messages" must be a list'),
        ([], 'the last of the "messages" must have the role "assistant"'),
        ([{"role": "user", "content": "q"}], 'the last of the "messages" must have the role "assistant"'),
        ([{"role": "human", "content": "q"}], "a message has the role 'human'"),
        ([{"content": "q"}], "a message has the role None"),
        ([{"role": "assistant", "content": None}], '"content" must be a string, not null'),
        ([{"role": "assistant", "content": [{"type": "text"}]}], '"content" must be a string, not a list'),
    ],
)
def test_bad_conversations(tmp_path, messages, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=re.escape(problem)):
        read(path)


# ---- one rule for bad records ----


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_nested_too_deep(tmp_path, opening, closing):
    deep = opening * 100_000 + "1" + closing * 100_000
    (tmp_path / "a.jsonl").write_text(f'"fine"\n{deep}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: JSON nested too deep"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(deep)
    with pytest.raises(UserError, match=r"a\.json: JSON nested too deep"):
        read(tmp_path / "a.json")


def test_null_is_an_empty_text_in_every_format(tmp_path):
    rows = [{"text": None}, {"text": "x"}, {"prompt": None, "answer": None, "text": None}, {"messages": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist([{"text": None}, {"text": "x"}]), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("text\n\nx\n")
    assert read(tmp_path) == ["x"] * 4
    for half in ({"prompt": "q", "answer": None}, {"prompt": None, "answer": "a"}):
        (tmp_path / "a.jsonl").write_text(json.dumps(half))
        parquet.write_table(pa.Table.from_pylist([half | {"prompt": half["prompt"]}]), tmp_path / "c.parquet")
        for name in ("a.jsonl", "c.parquet"):
            with pytest.raises(UserError, match=r'has "\w+" but no'):
                read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.md"])
def test_utf16_is_refused_with_and_without_mark(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes('"text"\n"naïve café"\n"words and words"\n'.encode(encoding))
    with pytest.raises(UserError, match=r"this is UTF-16 or UTF-32.*iconv"):
        read(path)


def test_zeros_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="begins with zeros"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"a\0b and other words\n")
    assert read(tmp_path / "a.txt") == ["a\0b and other words"]


def test_bad_records_are_counted_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 30)
    lines = ['"one"', '{"no": 1}', '"two"', "oops", b'"caf\xe9"', "[" * 100_000, '{"prompt": "q"}', '"three"']
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (tmp_path / "a.jsonl").write_bytes(data)
    tally = Tally(skip_bad=True)
    assert read(tmp_path / "a.jsonl", tally, skip_bad_records=True) == ["one", "two", "three"]
    assert tally.bad == 5 and "a.jsonl, line 5: not UTF-8 text" in tally.example
    (note,) = tally.notes("a.jsonl")
    assert note.startswith("a.jsonl: 5 bad record(s) left out, for example: ")
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\ntwo\n\nthree\n")
    for document, expected in (("line", ["one", "two", "three"]), ("paragraph", ["three"]), ("file", [])):
        tally = Tally(skip_bad=True)
        assert read(tmp_path / "a.txt", tally, document=document) == expected
        assert tally.bad == 1 and "a.txt, line 2: not UTF-8" in tally.example


def test_many_bad_records_take_no_more_time_than_good_ones(tmp_path):
    """Only the first is looked up by its line."""
    (tmp_path / "a.jsonl").write_text("oops\n" * 50_000)
    begun = time.perf_counter()
    read(tmp_path / "a.jsonl", tally := Tally(skip_bad=True))
    assert tally.bad == 50_000 and time.perf_counter() - begun < 20
