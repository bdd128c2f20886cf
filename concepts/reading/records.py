"""Records of question and answer files: JSON lines, one JSON array, or a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from concepts.reading.json_stream import refuse_constant, stream_list
from concepts.reading.record import Record, as_record
from concepts.reading.tables import SEPARATORS, read_headed_table
from concepts.reading.text_files import numbered_lines, readable, skip_mark
from groundscope.core.errors import DataError
from groundscope.core.user_files import open_regular, unique_keys


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, JSON lines or one JSON array, whichever it is; blank lines are skipped.

    Either way one record at a time is held.

    Raises
    ------
    DataError
        Naming file and line where it is not a regular file, cannot be read, is not UTF-8, or holds anything but JSON
        objects without repeated keys.
    """
    with readable(path), open_regular(path) as file:
        if not starts_array(file):
            yield from _lines(path, file)
            return
    yield from stream_list(path)


def read_rows(path: Path) -> Iterator[Record]:
    """Yield the records of a file: a table with a heading where the name ends in ``.tsv`` or ``.csv``, else JSON.

    Raises
    ------
    DataError
        As for `read_records` and `read_headed_table`; for a kind of table that is not read (``.xlsx``, ``.parquet``).
    """
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        yield from read_headed_table(path, SEPARATORS[suffix])
        return
    if suffix in {".xlsx", ".xls", ".parquet", ".pkl", ".arrow"}:
        msg = f"{path}: files of kind '{suffix}' are not read; save the table as .tsv, .csv or JSON lines"
        raise DataError(msg)
    yield from read_records(path)


def starts_array(file: IO[bytes]) -> bool:
    """Look at the first character that is not blank, and go back to the start of the text."""
    skip_mark(file)
    start = file.tell()
    first = b" "
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    return first == b"["


def _lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for where, line in numbered_lines(path, file):
        yield as_record(where, _parsed(where, line))


def _parsed(where: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        msg = f"{where}: not UTF-8 at byte {error.start + 1}: save the file as UTF-8"
        raise DataError(msg) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in data.strip() else f"column {error.colno}"
        why = error.msg.removesuffix(" starting at")
        cut = "" if data.endswith(b"\n") else "; the file ends in this line: was it cut?"
        msg = f"{where}: broken JSON at {place}: {why}{cut}"
        raise DataError(msg) from error
    except (ValueError, RecursionError) as error:  # NaN, a key twice, a number of thousands of digits, deep nesting
        msg = f"{where}: JSON that cannot be read: {error}"
        raise DataError(msg) from error
