"""Tables: the rows of .parquet, .arrow, .csv and .tsv files, and of hub data sets, as records."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from ds_tokimg.data.files import DELIMITERS, Span, format_of, opened, without_mark
from ds_tokimg.data.records import ReadOptions, Record, Tally, to_record
from ds_tokimg.errors import UserError

_ROWS_AT_A_TIME = 1000
_LONGEST_CELL = (1 << 31) - 1


def read_table(span: Span, options: ReadOptions, tally: Tally) -> Iterator[Record]:
    kind = format_of(span.path)[0]
    rows = {".parquet": _parquet_rows, ".arrow": _arrow_rows}.get(kind, _delimited_rows)(span, options)
    yield from records_of_rows(rows, span.path, options, tally)


def records_of_rows(
    rows: Iterable[tuple[int, dict[str, Any] | ValueError]], name: str, options: ReadOptions, tally: Tally
) -> Iterator[Record]:
    """(number, row or what is wrong with it) of each row of a table -> its record."""
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            yield to_record(row, options)
        except ValueError as error:
            place = f"{name}, {'line' if format_of(name)[0] in DELIMITERS else 'row'} {number}"
            tally.reject(partial(str, place), str(error))


def columns_of(name: str, columns: list[str], options: ReadOptions) -> list[str]:
    """Those of a table's columns that hold records. Raises UserError when there are none."""
    text = options.fields[0]
    if options.text_key in columns:
        return [options.text_key]
    found = [column for column in options.fields if column in columns]
    if text not in found and "messages" not in found and not {"prompt", "answer"} <= set(found):
        raise UserError(
            f'{name} has the columns {", ".join(columns)}; it needs "{text}", or "prompt" and "answer", or "messages" '
            "(--text_key names another column of texts)"
        )
    return found


@contextlib.contextmanager
def _table_errors(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable {format_of(path)[0][1:]} file: {error}") from error


def row_group_sizes(path: str, options: ReadOptions) -> list[int]:
    """The bytes in each row group of a parquet file. Raises UserError for one that has no texts."""
    from pyarrow import parquet

    with _table_errors(path):
        table = parquet.ParquetFile(path)
        columns_of(path, table.schema_arrow.names, options)
        return [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]


def _parquet_rows(span: Span, options: ReadOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import parquet

    with _table_errors(span.path):
        table = parquet.ParquetFile(span.path)
        first = sum(table.metadata.row_group(i).num_rows for i in range(span.start))
        columns = columns_of(span.path, table.schema_arrow.names, options)
        batches = table.iter_batches(_ROWS_AT_A_TIME, row_groups=range(span.start, span.stop), columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), first + 1)


def _arrow_rows(span: Span, options: ReadOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa

    with _table_errors(span.path), pa.memory_map(span.path) as file:
        try:
            batches = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:  # the other of the two forms of such files
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        number = 0
        for batch in batches:
            rows = batch.select(columns_of(span.path, batch.schema.names, options))
            for start in range(0, rows.num_rows, _ROWS_AT_A_TIME):
                for row in rows.slice(start, _ROWS_AT_A_TIME).to_pylist():
                    number += 1
                    yield number, row


def _delimited_rows(span: Span, options: ReadOptions) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Rows of a .csv or .tsv by the names in its first line, with the number of the line each ends on."""
    csv.field_size_limit(_LONGEST_CELL)
    with opened(span.path) as file:
        without_mark(span.path, file.peek(4096))  # for its check of UTF-16
        # What is not UTF-8 becomes half of a surrogate pair, which no record may hold.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = csv.reader(text, delimiter=DELIMITERS[format_of(span.path)[0]], strict=True)
        names = next(lines, None)
        if names is None:
            return
        columns = columns_of(span.path, names, options)
        while True:
            try:
                cells = next(lines, None)
            except csv.Error as error:
                yield lines.line_num, ValueError(f"not readable as a table: {error}")
                continue
            if cells is None:
                return
            if cells:
                yield lines.line_num, _row_of_cells(cells, names, columns)


def _row_of_cells(cells: list[str], names: list[str], columns: list[str]) -> dict[str, Any] | ValueError:
    """The cells of the named columns. Where a table mixes kinds of records, a cell without text is one that is
    missing."""
    if len(cells) != len(names):
        return ValueError(f"{len(cells)} cells in a table of {len(names)} columns")
    row = dict(zip(names, cells, strict=True))
    mixed = len(columns) > 1 and columns != ["prompt", "answer"]
    return {name: (row[name] or None) if mixed else row[name] for name in columns}
