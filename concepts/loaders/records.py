"""Records of question files, JSON lines or one JSON array, with the place of each for error messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from concepts.errors import DataError

LONGEST_LINE = 1 << 20
"""Bytes of a line that may be read into memory; a question has a few hundred."""
LARGEST_ARRAY = 1 << 28
"""Bytes of a file that may be read whole, because it is one JSON array."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One object of a file."""

    where: str
    """File, and line or place in the array, for people."""
    values: dict[str, Any]

    def field(self, *names: str) -> Any:
        """Return the first of these fields that is there; raises `DataError` where none is."""
        for name in names:
            if name in self.values:
                return self.values[name]
        wanted = " or ".join(f"'{n}'" for n in names)
        msg = f"{self.where}: no field {wanted}; it has {', '.join(map(repr, self.values)) or 'none'}"
        raise DataError(msg)

    def text(self, *names: str) -> str:
        """Return a field that holds words; raises `DataError` where it holds anything else or nothing."""
        value = self.field(*names)
        if not isinstance(value, str) or not value.strip():
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold words, not {_shown(value)}"
            raise DataError(msg)
        return value

    def identifier(self, *names: str) -> str:
        """Return a field that holds a name or a whole number, as text; raises `DataError` for anything else."""
        value = self.field(*names)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(*names)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, JSON lines or one JSON array, whichever it is; blank lines are skipped.

    JSON lines are read one at a time; an array is read whole, up to `LARGEST_ARRAY` bytes.

    Raises
    ------
    DataError
        Naming file and line where it cannot be read, is not UTF-8, or holds anything but JSON objects.
    """
    with _readable(path), path.open("rb") as file:
        if _starts_array(file):
            yield from _array(path, file)
        else:
            yield from _lines(path, file)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with _readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"file '{path}' cannot be read: {error.strerror or error}"
        raise DataError(msg) from error


def _starts_array(file: BinaryIO) -> bool:
    """Look at the first character that is not blank, and go back to the start of the text."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    first = b" "
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    return first == b"["


def _lines(path: Path, file: BinaryIO) -> Iterator[Record]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}: line {number}"
        if len(line) == LONGEST_LINE:
            msg = f"{where} is longer than {LONGEST_LINE} bytes: write one question a line"
            raise DataError(msg)
        if line.strip():
            yield _record(where, _parsed(where, line))


def _array(path: Path, file: BinaryIO) -> Iterator[Record]:
    size = path.stat().st_size
    if size > LARGEST_ARRAY:
        msg = f"{path}: one JSON array of {size} bytes, more than {LARGEST_ARRAY}: write it as JSON lines, one object a line"
        raise DataError(msg)
    values = _parsed(str(path), file.read(LARGEST_ARRAY + 1))
    for number, value in enumerate(values, 1):
        yield _record(f"{path}: record {number}", value)


def _parsed(where: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        msg = f"{where}: not UTF-8 at byte {error.start + 1}"
        raise DataError(msg) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in data.strip() else f"column {error.colno}"
        msg = f"{where}: broken JSON at {place}: {error.msg}"
        raise DataError(msg) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        msg = f"{where}: JSON that cannot be read: {error}"
        raise DataError(msg) from error


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        msg = f"{where}: expected a JSON object with fields, found {_shown(value)}"
        raise DataError(msg)
    return Record(where, value)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
