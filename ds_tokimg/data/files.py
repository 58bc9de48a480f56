"""Files: what their names say about them, their bytes unpacked, and their lines.

Every reader passes over its file once, whatever the length of its lines.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ds_tokimg.data.records import Tally
from ds_tokimg.errors import UserError

PLAIN = (".txt", ".md")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (".parquet", ".arrow")
FORMATS = (*PLAIN, ".json", ".jsonl", ".ndjson", *DELIMITERS, *TABLES)
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
FORMAT_HELP = f"{', '.join(FORMATS)} (all but {' and '.join(TABLES)} also as {', '.join(COMPRESSIONS)})"

# What is read at a time, and what is worth handing to a worker.
BLOCK_BYTES = 2 << 20
TO_THE_END = sys.maxsize


class Span(NamedTuple):
    """Part of a file (bytes start…stop of its lines, or row groups of a parquet file) or rows of a hub data set."""

    path: str
    start: int
    stop: int


def format_of(path: str | Path) -> tuple[str, str | None]:
    """(format, compression) from a file's name, in any case: ("" , None) for one that cannot be read."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2:-1] if compression else suffixes[-1:]
    if not kind or kind[0] not in FORMATS or (compression and kind[0] in TABLES):
        return "", None
    return kind[0], compression


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """The bytes of a file, unpacked, as a buffered reader. Raises UserError when it is missing or damaged."""
    compression = format_of(path)[1]
    try:
        with _unpacked(path, compression) as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:  # pyarrow's errors of reading are OSErrors
        reason = getattr(error, "strerror", None) or error
        damage = f": not a whole {compression} file: {error}" if compression else f": {reason}"
        raise UserError(f"cannot read {path}{damage}") from error


def _unpacked(path: str, compression: str | None) -> Any:
    if compression == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 16)
    if compression is None:
        return open(path, "rb", buffering=1 << 20)  # lines of any length are read in pieces of this size
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return openers[compression](path, "rb")


def blocks(span: Span) -> Iterator[tuple[int, bytes]]:
    """The lines that begin inside a span, in blocks of whole ones: (byte where the block begins, its bytes)."""
    with opened(span.path) as file:
        offset = span.start
        if offset:
            # From one byte earlier: the rest of a line that belongs to the span before. No line may begin in here.
            file.seek(offset - 1)
            rest = file.readline(span.stop - offset)
            if not rest.endswith(b"\n"):
                return
            offset += len(rest) - 1
        while offset < span.stop:
            data = file.read(min(BLOCK_BYTES, span.stop - offset))
            if data and not data.endswith(b"\n"):
                data += file.readline()
            if not data:
                return
            yield offset, data if offset else without_mark(span.path, data)
            offset += len(data)


def without_mark(path: str, data: bytes) -> bytes:
    """The beginning of a file without its byte order mark. Raises UserError for UTF-16 and UTF-32, with a mark or
    without: their Latin letters are also UTF-8, with zeros between them."""
    head = data[:4096]
    zeros = [head[place::2].count(0) for place in (0, 1)]
    if len(head) > 3 and min(zeros) > len(head) // 4:
        raise UserError(f"{path}: this file begins with zeros, not with text: it is damaged, or no text file")
    marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    if marked or (len(head) > 3 and max(zeros) > len(head) // 4):
        raise UserError(
            f"{path}: this is UTF-16 or UTF-32, not UTF-8 text; convert the file, for example with "
            "`iconv -f utf-16 -t utf-8` (utf-16le or utf-16be where it has no byte order mark)"
        )
    return data.removeprefix(codecs.BOM_UTF8)


def where(path: str, offset: int, more: int = 0) -> Callable[[], str]:
    """Names, when asked, the line that begins at a byte offset, or the one `more` lines after it."""
    return lambda: f"{path}, line {_line_number(path, offset) + more}"


def _line_number(path: str, offset: int) -> int:
    """The number (from 1) of the line that begins at a byte offset."""
    number, block = 1, 1 << 24
    with opened(path) as file:
        for start in range(0, offset, block):
            number += file.read(min(block, offset - start)).count(b"\n")
    return number


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    byte = data[error.start]
    return f"not UTF-8 text (byte 0x{byte:02x}); convert the file, for example with `iconv -f latin1 -t utf-8`"


def decoded(path: str, offset: int, data: bytes, tally: Tally) -> str | None:
    """The text of one record that begins at a byte of the file; None where it is no text and was left out."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        lines_before = data.count(b"\n", 0, error.start)
        tally.reject(where(path, offset, lines_before), not_utf8(data, error))
        return None
