"""Reads texts from files: which files a data path means, their records, and what is wrong with a bad one.

The files are cut into spans that are read independently, so that workers share one large file. Lines are read here
and not by the readers of `datasets`: those infer one schema for all files (plain strings, texts and prompt/answer
pairs may be mixed), and their errors name no line.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_tokimg.errors import UserError

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
FIELDS = ("text", "prompt", "answer")
FORMAT_HELP = 'a record is a string, {"text": ...} or {"prompt": ..., "answer": ...}'

# A plain text, or a (prompt, answer) pair.
Record = str | tuple[str, str]

_GROUP_BYTES = 2 << 20


class Span(NamedTuple):
    """Part of a file (bytes start…stop of lines, or row groups of a parquet file) or rows of a hub data set."""

    path: str
    start: int
    stop: int


@dataclass
class Source:
    """A corpus as found: groups of spans, each about as much work as the next.

    fingerprint: changes whenever the files do. rows: the `datasets.Dataset` when the corpus comes from the hub.
    """

    name: str
    groups: list[list[Span]]
    fingerprint: str
    num_bytes: int
    rows: object = field(default=None, repr=False)

    def read(self, group: int) -> Iterator[Record]:
        """The records of one group, in order. Raises UserError for a bad one."""
        for span in self.groups[group]:
            yield from _read_rows(span, self.rows) if self.rows is not None else read_span(span)


def find(data_path: str | Path) -> Source:
    """What there is to read at `data_path`: a file, a folder, or else a Hugging Face data set name.

    Raises UserError when there is nothing.
    """
    path = Path(data_path).expanduser()
    if not path.exists():
        return _find_on_hub(str(data_path))
    files = _list_files(path)
    spans = [sized for file in files for sized in _spans(file)]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    total = sum(size for _, size, _ in stamps)
    return Source(str(data_path), _group(spans), _digest(stamps), total)


def _list_files(path: Path) -> list[Path]:
    """The files of a folder, sorted by path, hidden ones and other formats left out; or the file itself."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'!r}; use {', '.join(SUFFIXES)}"
            )
        return [path]
    found = [f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file()]
    visible = [f for f in found if not any(p.startswith(".") for p in f.relative_to(path).parts)]
    if not visible:
        raise UserError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    return sorted(visible)


def _spans(file: Path) -> list[tuple[Span, int]]:
    """The spans of a file and the bytes in each."""
    path = str(file)
    if file.suffix == ".parquet":
        metadata = _open_parquet(path).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        return [(Span(path, i, i + 1), size) for i, size in enumerate(sizes)]
    size = _check_readable(file)
    step = size if file.suffix == ".json" else _GROUP_BYTES  # a JSON document is parsed whole
    spans = [Span(path, i, min(i + step, size)) for i in range(0, size, max(1, step))]
    return [(span, span.stop - span.start) for span in spans]


def _check_readable(file: Path) -> int:
    try:
        with open(file, "rb") as stream:
            return stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _group(spans: list[tuple[Span, int]]) -> list[list[Span]]:
    """Puts small files together, so that a folder of thousands of them is not thousands of tiny jobs."""
    groups: list[list[Span]] = []
    room = 0
    for span, size in spans:
        if size > room:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append(span)
        room -= size
    return groups


def _digest(parts: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# ---- reading ----


def read_span(span: Span) -> Iterable[Record]:
    """The records of a span, blank ones left out. Raises UserError that names file, line and problem."""
    suffix = Path(span.path).suffix
    if suffix == ".parquet":
        return _read_parquet(span)
    if suffix == ".json":
        return _read_json(span.path)
    text, offset = _read_lines(span)
    lines = text.split("\n")
    if suffix == ".jsonl":
        return _parse_lines(span.path, offset, lines)
    if "\r" in text:
        lines = [line.removesuffix("\r") for line in lines]
    return [line for line in lines if line and not line.isspace()]


def _read_lines(span: Span) -> tuple[str, int]:
    """The lines that begin inside the span, and the byte where the first of them begins."""
    with open(span.path, "rb") as file:
        if span.start:
            # From one byte earlier: the rest of a line that belongs to the span before.
            file.seek(span.start - 1)
            file.readline()
        offset = file.tell()
        data = file.read(max(0, span.stop - offset))
        if data and not data.endswith(b"\n"):
            data += file.readline()
    if offset == 0:
        data = data.removeprefix(codecs.BOM_UTF8)
    return _decode(span.path, data, offset), offset


def _decode(path: str, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _line_number(path, offset) + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert the file, for example "
            "with `iconv -f latin1 -t utf-8`"
        ) from error


def _line_number(path: str, offset: int) -> int:
    """The number (from 1) of the line that begins at a byte offset."""
    number, block = 1, 1 << 24
    with open(path, "rb") as file:
        for start in range(0, offset, block):
            number += file.read(min(block, offset - start)).count(b"\n")
    return number


def _parse_lines(path: str, offset: int, lines: list[str]) -> list[Record]:
    records = []
    for i, line in enumerate(lines):
        if not line or line.isspace():
            continue
        try:
            records.append(to_record(json.loads(line)))
        except json.JSONDecodeError as error:
            where = f"{path}, line {_line_number(path, offset) + i}"
            raise UserError(
                f"{where}: invalid JSON: {error.msg} (column {error.colno}); a .jsonl file has one record a "
                f"line, and {FORMAT_HELP}"
            ) from error
        except ValueError as error:
            raise UserError(f"{path}, line {_line_number(path, offset) + i}: {error}") from error
    return [record for record in records if not _is_blank(record)]


def _read_json(path: str) -> list[Record]:
    text = _decode(path, Path(path).read_bytes().removeprefix(codecs.BOM_UTF8), 0)
    if not text or text.isspace():
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " (for one object a line, name the file .jsonl)" if error.msg == "Extra data" else ""
        where = f"{path}, line {error.lineno}"
        raise UserError(f"{where}: invalid JSON: {error.msg} (column {error.colno}){hint}") from error
    items = content if isinstance(content, list) else [content]
    records, i = [], 0
    try:
        for i, item in enumerate(items):  # noqa: B007 (the handler names the item)
            records.append(to_record(item))
    except ValueError as error:
        line = _line_of_item(text, i) if items is content else 1
        raise UserError(f"{path}, line {line}: {error} (record {i + 1})") from error
    return [record for record in records if not _is_blank(record)]


def _line_of_item(text: str, index: int) -> int:
    """The line on which an item of a JSON list begins."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    for i in range(index + 1):
        while text[position].isspace() or text[position] == ",":
            position += 1
        if i < index:
            _, position = decoder.raw_decode(text, position)
    return text.count("\n", 0, position) + 1


def to_record(item: Any) -> Record:
    """A parsed JSON value or table row -> text or (prompt, answer). Raises ValueError with what is wrong."""
    if isinstance(item, str):
        return _checked("a record", item)
    if not isinstance(item, dict):
        raise ValueError(f"{FORMAT_HELP}; this one is {_kind(item)}")
    present = [name for name in FIELDS if item.get(name) is not None]
    if present == ["text"]:
        return _checked("text", item["text"])
    if present == ["prompt", "answer"]:
        return _checked("prompt", item["prompt"]), _checked("answer", item["answer"])
    if "text" in present:
        raise ValueError(f'has both "text" and "{present[1]}"; {FORMAT_HELP}')
    if present:
        missing = "answer" if present == ["prompt"] else "prompt"
        raise ValueError(f'has "{present[0]}" but no "{missing}"; {FORMAT_HELP}')
    keys = ", ".join(map(repr, list(item)[:8])) or "none"
    raise ValueError(f"{FORMAT_HELP}; this one has the keys: {keys}")


def _checked(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string, not {_kind(value)}')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
            raise ValueError(f'"{name}" holds {value[error.start]!a}, which is not a valid character') from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _is_blank(record: Record) -> bool:
    """Whether there is nothing to learn: a blank text, or a pair whose answer is blank."""
    scored = record if isinstance(record, str) else record[1]
    return not scored or scored.isspace()


# ---- tables ----


def _open_parquet(path: str) -> Any:
    from pyarrow import parquet

    with _parquet_errors(path):
        table = parquet.ParquetFile(path)
    _check_columns(path, table.schema_arrow.names)
    return table


@contextlib.contextmanager
def _parquet_errors(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from error


def _check_columns(name: str, columns: list[str]) -> None:
    if "text" not in columns and not {"prompt", "answer"} <= set(columns):
        raise UserError(f'{name} has the columns {", ".join(columns)}; it needs "text", or "prompt" and "answer"')


def _read_parquet(span: Span) -> list[Record]:
    table = _open_parquet(span.path)
    first = sum(table.metadata.row_group(i).num_rows for i in range(span.start))
    columns = [name for name in FIELDS if name in table.schema_arrow.names]
    with _parquet_errors(span.path):
        rows = table.read_row_groups(range(span.start, span.stop), columns=columns).to_pylist()
    return _rows_to_records(span.path, rows, first)


def _read_rows(span: Span, dataset: Any) -> list[Record]:
    columns = [name for name in FIELDS if name in dataset.column_names]
    batch = dataset.select_columns(columns)[span.start : span.stop]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return _rows_to_records(span.path, rows, span.start)


def _rows_to_records(name: str, rows: list[dict[str, Any]], first: int) -> list[Record]:
    records = []
    for i, row in enumerate(rows):
        if all(value is None for value in row.values()):
            continue
        try:
            records.append(to_record(row))
        except ValueError as error:
            raise UserError(f"{name}, row {first + i + 1}: {error}") from error
    return [record for record in records if not _is_blank(record)]


def _find_on_hub(name: str) -> Source:
    """`owner/name` or `owner/name:configuration`, the training split, read by `datasets`."""
    if name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no such file or folder: {name}")
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split="train")
    except Exception as error:  # network, missing repository, unknown configuration: each library its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{name!r} is no file or folder here, and cannot be loaded as a Hugging Face data set: {reason}"
        ) from error
    _check_columns(name, rows.column_names)
    step = 2000
    groups = [[Span(name, i, min(i + step, len(rows)))] for i in range(0, len(rows), step)]
    return Source(name, groups, _digest([name, rows._fingerprint]), rows.dataset_size or 0, rows)
