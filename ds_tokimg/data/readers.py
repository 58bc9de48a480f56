"""Readers: the records of a file, or of a part of one, in every format.

The files are cut into spans that are read independently, so that workers share one large file. Lines are read here
and not by the readers of `datasets`: those infer one schema for all files (plain strings, texts and prompt/answer
pairs may be mixed), and their errors name no line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ds_tokimg.data import files
from ds_tokimg.data.files import (
    DELIMITERS,
    PLAIN,
    TABLES,
    TO_THE_END,
    Span,
    blocks,
    decoded,
    format_of,
    not_utf8,
    where,
)
from ds_tokimg.data.records import ReadOptions, Record, Tally, is_blank, to_record
from ds_tokimg.data.tables import read_table, row_group_sizes
from ds_tokimg.errors import UserError

# What compressed text is taken to grow by, to plan the work.
_EXPANSION = 4
_TOO_DEEP = "JSON nested too deep to be read"


# ---- cutting ----


def spans_of(file: Path, options: ReadOptions) -> list[tuple[Span, int]]:
    """The spans of a file, and about how many bytes of text are in each."""
    path, (kind, compression) = str(file), format_of(file)
    if kind == ".parquet":
        return [(Span(path, i, i + 1), size) for i, size in enumerate(row_group_sizes(path, options))]
    size = file.stat().st_size
    whole = kind in (".json", ".arrow", *DELIMITERS) or document_of(kind, options) == "file"
    if compression or whole:
        return [(Span(path, 0, TO_THE_END), size * (_EXPANSION if compression else 1))] if size else []
    spans = [Span(path, i, min(i + files.BLOCK_BYTES, size)) for i in range(0, size, files.BLOCK_BYTES)]
    return [(span, span.stop - span.start) for span in spans]


def document_of(kind: str, options: ReadOptions) -> str:
    """What one text of a file of this format is: "line", "paragraph" or "file"; "" where it has records."""
    if kind not in PLAIN:
        return ""
    return options.document or ("file" if kind == ".md" else "line")


def grouped(spans: list[tuple[Span, int]]) -> list[list[Span]]:
    """Puts small files together, so that a folder of thousands of them is not thousands of tiny jobs."""
    groups: list[list[Span]] = []
    room = 0
    for span, size in spans:
        if size > room:
            groups.append([])
            room = files.BLOCK_BYTES
        groups[-1].append(span)
        room -= size
    return groups


# ---- reading ----


def read_span(span: Span, options: ReadOptions, tally: Tally) -> Iterator[Record]:
    """The records of a span in order, blank ones left out. A bad one goes to `tally.reject`.

    Raises UserError that names the file where a file cannot be read at all.
    """
    kind = format_of(span.path)[0]
    records: Iterator[Record]
    if kind in PLAIN:
        read = {"line": _read_lines, "paragraph": _read_paragraphs, "file": _read_file}
        records = read[document_of(kind, options)](span, tally)
    elif kind == ".json":
        records = _read_json(span, options, tally)
    elif kind in TABLES or kind in DELIMITERS:
        records = read_table(span, options, tally)
    else:
        records = _read_jsonl(span, options, tally)
    return (record for record in records if not is_blank(record))


# ---- plain texts and lines of JSON ----


def _lines(path: str, offset: int, data: bytes, tally: Tally) -> list[str]:
    """The lines of a block of whole ones. One that is no text is empty (so that the others keep their number)."""
    try:
        return data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        pass
    lines = []
    for line in data.split(b"\n"):
        lines.append(decoded(path, offset, line, tally) or "")
        offset += len(line) + 1
    return lines


def _read_lines(span: Span, tally: Tally) -> Iterator[str]:
    for offset, data in blocks(span):
        lines = _lines(span.path, offset, data, tally)
        if b"\r" in data:
            lines = [line.removesuffix("\r") for line in lines]
        lines = [line for line in lines if line and not line.isspace()]
        tally.count_lines(lines)
        yield from lines


def _read_paragraphs(span: Span, tally: Tally) -> Iterator[str]:
    """The paragraphs that follow the blank lines inside the span, to their ends; the first span of a file also has the
    paragraph that the file begins with."""
    begin = 0
    lines: list[bytes] | None = None if span.start else []
    for offset, line in _lines_from(span):
        blank = not line.strip()
        if blank and lines:
            yield from _paragraph(span.path, begin, lines, tally)
        if offset >= span.stop and (blank or lines is None):
            return
        if blank:
            lines = []
        elif lines is not None:
            begin = begin if lines else offset
            lines.append(line)
    if lines:
        yield from _paragraph(span.path, begin, lines, tally)


def _paragraph(path: str, begin: int, lines: list[bytes], tally: Tally) -> Iterator[str]:
    text = decoded(path, begin, b"\n".join(lines), tally)
    if text is not None:
        yield text.replace("\r\n", "\n").removesuffix("\r")


def _lines_from(span: Span) -> Iterator[tuple[int, bytes]]:
    """(byte where it begins, bytes without \\n) of the lines that begin inside the span and of all that follow them;
    nothing where none begins inside."""
    inside = False
    for part in (span, span._replace(start=span.stop, stop=TO_THE_END)):
        for offset, data in blocks(part):
            inside = True
            for line in data.removesuffix(b"\n").split(b"\n"):
                yield offset, line
                offset += len(line) + 1
        if not inside or span.stop == TO_THE_END:
            return


def _read_file(span: Span, tally: Tally) -> Iterator[str]:
    """The whole file as one text, without the line breaks at its end."""
    text = decoded(span.path, 0, _content(span.path), tally)
    if text is not None:
        yield text.replace("\r\n", "\n").rstrip("\n")


def _content(path: str) -> bytes:
    with files.opened(path) as file:
        return files.without_mark(path, file.read())


def _read_jsonl(span: Span, options: ReadOptions, tally: Tally) -> Iterator[Record]:
    for offset, data in blocks(span):
        for i, line in enumerate(_lines(span.path, offset, data, tally)):
            if not line or line.isspace():
                continue
            try:
                yield to_record(json.loads(line), options)
            except json.JSONDecodeError as error:
                problem = f"invalid JSON: {error.msg} (column {error.colno}); a .jsonl file has one record a line, and "
                tally.reject(where(span.path, offset, i), problem + options.format_help)
            except RecursionError:
                tally.reject(where(span.path, offset, i), _TOO_DEEP)
            except ValueError as error:
                tally.reject(where(span.path, offset, i), str(error))


def _read_json(span: Span, options: ReadOptions, tally: Tally) -> Iterator[Record]:
    """The records of a .json file: a list, one object, or, as many such files are, one object a line."""
    path, data = span.path, _content(span.path)
    try:
        text = data.decode("utf-8")
        content = json.loads(text) if data.strip() else []
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: {not_utf8(data, error)}") from error
    except RecursionError:
        raise UserError(f"{path}: {_TOO_DEEP}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(span, options, tally)
            return
        raise UserError(f"{path}, line {error.lineno}: invalid JSON: {error.msg} (column {error.colno})") from error
    items = content if isinstance(content, list) else [content]
    for i, item in enumerate(items):
        try:
            yield to_record(item, options)
        except ValueError as error:
            tally.reject(partial(_place_of_item, path, text, i), f"{error} (record {i + 1})")


def _place_of_item(path: str, text: str, index: int) -> str:
    """Names the line on which an item of a JSON list begins (the first, where there is no list)."""
    if not text.lstrip().startswith("["):
        return f"{path}, line 1"
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    for i in range(index + 1):
        while text[position].isspace() or text[position] == ",":
            position += 1
        if i < index:
            _, position = decoder.raw_decode(text, position)
    return f"{path}, line {text.count(chr(10), 0, position) + 1}"
