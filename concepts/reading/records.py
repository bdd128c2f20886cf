"""Records of question and answer files: JSON lines, one JSON array, or a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from concepts.reading.json_stream import refuse_constant, stream_list
from concepts.reading.record import Record, as_record
from concepts.reading.tables import SEPARATORS, read_table
from concepts.reading.text_files import numbered_lines, readable, skip_byte_order_mark
from groundscope.core.errors import DataError
from groundscope.core.user_files import open_regular, unique_keys

_UNSUPPORTED_TABLES = frozenset({".xlsx", ".xls", ".parquet", ".pkl", ".arrow"})


def read_records(path: Path) -> Iterator[Record]:
    r"""Yield the records of a file: a table with a header row if the name ends in ``.tsv`` or ``.csv``, otherwise JSON.

    Raises
    ------
    DataError
        As for `read_json_records` and `read_table`; also for unsupported table formats (``.xlsx``, ``.parquet``).

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from concepts.reading.records import read_records
    >>> path = Path(tempfile.mkdtemp()) / "questions.tsv"
    >>> _ = path.write_text("index\tanswer\n1\tyes\n")
    >>> [record.values for record in read_records(path)]
    [{'index': '1', 'answer': 'yes'}]
    """
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        yield from read_table(path, SEPARATORS[suffix])
        return
    if suffix in _UNSUPPORTED_TABLES:
        msg = f"{path}: tables of format '{suffix}' are not supported; save the table as .tsv, .csv or JSON lines"
        raise DataError(msg)
    yield from read_json_records(path)


def read_json_records(path: Path) -> Iterator[Record]:
    """Yield the records of JSON lines or of one JSON array, one at a time; blank lines are skipped.

    Raises
    ------
    DataError
        Names the file and line: if it is not a regular file, cannot be read, is not UTF-8, or contains anything but JSON
        objects with unique keys.
    """
    with readable(path), open_regular(path) as file:
        if not _starts_with_array(file):
            for where, line in numbered_lines(path, file):
                yield as_record(where, _parse(where, line))
            return
    yield from stream_list(path)


def _starts_with_array(file: IO[bytes]) -> bool:
    """Whether the first character that is not blank is ``[``; the file is left at the start of its text."""
    skip_byte_order_mark(file)
    start = file.tell()
    first = b" "
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    return first == b"["


def _parse(where: str, data: bytes) -> Any:
    """Parse one JSON value; raises `DataError` with the column of the error."""
    try:
        return json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        msg = f"{where}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        raise DataError(msg) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in data.strip() else f"column {error.colno}"
        reason = error.msg.removesuffix(" starting at")
        truncated = "" if data.endswith(b"\n") else "; the file ends in this line, so it may be truncated"
        msg = f"{where}: invalid JSON at {place}: {reason}{truncated}"
        raise DataError(msg) from error
    except (ValueError, RecursionError) as error:  # NaN, a repeated key, a number of thousands of digits, deep nesting
        msg = f"{where}: invalid JSON: {error}"
        raise DataError(msg) from error
