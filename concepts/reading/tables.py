"""Tables as records: tab-separated lines, and tables with a header row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from concepts.reading.record import Record
from concepts.reading.text_files import numbered_lines, readable, skip_mark
from groundscope.core.errors import DataError
from groundscope.core.user_files import open_regular

LONGEST_ROW = 1 << 26
"""Bytes of one row of a table with a heading; tables may hold images as base64."""
NOT_AVAILABLE = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
    | {"NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Cells that pandas reads as missing (`pandas.read_csv`, ``na_values``)."""
SEPARATORS = {".tsv": "\t", ".csv": ","}
"""Ending of a table's file name to what stands between its cells."""


def read_table(path: Path, fields: Sequence[str], *, spare: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the lines of a tab-separated file without a heading as records; blank lines are skipped.

    Parameters
    ----------
    path
        The file, UTF-8.
    fields
        What its columns are called; a line has as many.
    spare
        Columns that a line may have after those.

    Raises
    ------
    DataError
        Naming file and line, for a line with other columns, too long, or not UTF-8.
    """
    names = (*fields, *spare)
    with readable(path), open_regular(path) as file:
        skip_mark(file)
        for where, line in numbered_lines(path, file):
            try:
                cells = line.decode().rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                msg = f"{where}: not UTF-8 at byte {error.start + 1}: save the file as UTF-8"
                raise DataError(msg) from error
            if not len(fields) <= len(cells) <= len(names):
                msg = f"{where}: {len(cells)} columns between tabs, but {', '.join(names)} are expected"
                raise DataError(msg)
            yield Record(where, dict(zip(names, cells, strict=False)))


def read_headed_table(path: Path, separator: str) -> Iterator[Record]:
    """Yield the rows of a table whose first row names its columns, cut into cells by the rules of `pandas.read_csv`.

    A cell may be quoted, with ``""`` for a quote, separators and line breaks inside. A cell that is empty or one of
    `NOT_AVAILABLE` is None, as pandas makes it missing. Every other cell is its text: whole numbers stay exact also in
    columns with missing cells. One row at a time is held.

    Raises
    ------
    DataError
        Naming file and line: a column that is named twice or not at all, a row with more or fewer cells than columns, a
        quote that is never closed, more than `LONGEST_ROW` bytes, not UTF-8.
    """
    names: list[str] = []
    with readable(path), open_regular(path) as file:
        skip_mark(file)
        for where, cells in _rows(path, file, separator):
            if not names:
                names = cells
                twice = next((name for name in names if not name.strip() or names.count(name) > 1), None)
                if twice is not None:
                    msg = f"{where}: column '{twice}' occurs twice or has no name; give each column one name"
                    raise DataError(msg)
                continue
            if len(cells) != len(names):
                msg = f"{where}: {len(cells)} cells, but the heading names {len(names)} columns"
                raise DataError(msg)
            yield Record(
                where, {n: None if c in NOT_AVAILABLE else c for n, c in zip(names, cells, strict=True)}, table=True
            )


def _rows(path: Path, file: IO[bytes], separator: str) -> Iterator[tuple[str, list[str]]]:
    """Cut a table into rows of cells; blank lines between rows are skipped."""
    cells: list[str] = []
    parts: list[str] = []  # of the quoted cell that is open
    quoted, size, where = False, 0, ""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW), b""), 1):
        size = len(line) if not quoted else size + len(line)
        where = where if quoted else f"{path}: line {number}"
        if size >= LONGEST_ROW:
            msg = f"{where}: a row of more than {LONGEST_ROW} bytes; is a quote not closed?"
            raise DataError(msg)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            msg = f"{path}: line {number}: not UTF-8 at byte {error.start + 1}: save the file as UTF-8"
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
        msg = f"{where}: a quote is opened and never closed; was the file cut?"
        raise DataError(msg)
