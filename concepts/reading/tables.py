"""Tables as records: tab-separated lines without a header, and tables with a header row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from concepts.reading.record import Record
from concepts.reading.text_files import numbered_lines, readable, skip_byte_order_mark
from groundscope.core.errors import DataError
from groundscope.core.text import format_count
from groundscope.core.user_files import open_regular

LONGEST_ROW = 1 << 26
"""Limit in bytes of one row of a table with a header; tables may contain images as base64."""
NOT_AVAILABLE = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
    | {"NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Cells that pandas reads as missing (`pandas.read_csv`, ``na_values``)."""
SEPARATORS = {".tsv": "\t", ".csv": ","}
"""Suffix of a table's file name to the separator of its cells."""


def read_tab_separated(path: Path, fields: Sequence[str], *, optional: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the lines of a tab-separated file without a header as records; blank lines are skipped.

    Parameters
    ----------
    path
        The file, in UTF-8.
    fields
        Names of the columns.
    optional
        Names of further columns that a line may have after these.

    Raises
    ------
    DataError
        Names the file and line: for another number of columns, a line that is too long, or one that is not UTF-8.
    """
    names = (*fields, *optional)
    with readable(path), open_regular(path) as file:
        skip_byte_order_mark(file)
        for where, line in numbered_lines(path, file):
            try:
                cells = line.decode().rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                msg = f"{where}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
                raise DataError(msg) from error
            if not len(fields) <= len(cells) <= len(names):
                msg = f"{where}: {format_count(len(cells), 'tab-separated column')}, expected {', '.join(names)}"
                raise DataError(msg)
            yield Record(where, dict(zip(names, cells, strict=False)))


def read_table(path: Path, separator: str) -> Iterator[Record]:
    """Yield the rows of a table with a header row, one at a time, with the cells that `pandas.read_csv` returns.

    A cell may be quoted, and then contain separators, line breaks, and quotes as ``""``. A cell that is empty or in
    `NOT_AVAILABLE` is None, as in pandas. All other cells are text, so whole numbers are exact even in columns with missing
    cells, where pandas converts them to floats.

    Raises
    ------
    DataError
        Names the file and line: for a column without a name or with a repeated name, a row with another number of cells
        than columns, an unclosed quote, a row of `LONGEST_ROW` bytes or more, or text that is not UTF-8.
    """
    names: list[str] = []
    with readable(path), open_regular(path) as file:
        skip_byte_order_mark(file)
        for where, cells in _rows(path, file, separator):
            if not names:
                names = cells
                ambiguous = next((name for name in names if not name.strip() or names.count(name) > 1), None)
                if ambiguous is not None:
                    msg = f"{where}: column '{ambiguous}' occurs twice or has no name; give each column a unique name"
                    raise DataError(msg)
                continue
            if len(cells) != len(names):
                msg = f"{where}: {format_count(len(cells), 'cell')}, but the header has {len(names)} columns"
                raise DataError(msg)
            yield Record(
                where, {n: None if c in NOT_AVAILABLE else c for n, c in zip(names, cells, strict=True)}, table=True
            )


def _rows(path: Path, file: IO[bytes], separator: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of a table as lists of cells; blank lines between rows are skipped."""
    cells: list[str] = []
    parts: list[str] = []  # of the current quoted cell
    quoted, size, where = False, 0, ""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW), b""), 1):
        size = len(line) if not quoted else size + len(line)
        where = where if quoted else f"{path}: line {number}"
        if size >= LONGEST_ROW:
            msg = f"{where}: the row has more than {LONGEST_ROW} bytes; a quote may be unclosed"
            raise DataError(msg)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            msg = f"{path}: line {number}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
            raise DataError(msg) from error
        stop = len(text.rstrip("\r\n"))
        if not quoted and not text.strip(" \t\r\n") and separator not in text:
            continue
        at = 0
        while True:
            if quoted or text.startswith('"', at, stop):
                at += not quoted
                quoted, end = True, text.find('"', at)
                if end < 0:
                    parts.append(text[at:])
                    break
                parts.append(text[at:end])
                if text.startswith('""', end):
                    parts.append('"')
                    at = end + 2
                    continue
                quoted, at = False, end + 1
            end = text.find(separator, at, stop)
            cells.append("".join(parts) + text[at : stop if end < 0 else end])
            parts.clear()
            if end < 0:
                yield where, cells
                cells = []
                break
            at = end + 1
    if quoted:
        msg = f"{where}: a quote is not closed before the end of the file, which may be truncated"
        raise DataError(msg)
