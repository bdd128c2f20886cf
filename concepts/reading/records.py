"""Records of question files, JSON lines, one JSON array or tab-separated, with the place of each for error messages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from groundscope.core.errors import DataError

LONGEST_LINE = 1 << 20
"""Bytes of a line that may be read into memory; a question has a few hundred."""
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

    def numbers(self, *names: str) -> tuple[float, ...]:
        """Return fields that each hold a finite number; raises `DataError` where one holds anything else."""
        found = []
        for name in names:
            value = self.field(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                msg = f"{self.where}: field '{name}' must hold a number, not {_shown(value)}"
                raise DataError(msg)
            found.append(float(value))
        return tuple(found)

    def list(self, *names: str) -> list[Any]:
        """Return a field that holds a list; raises `DataError` where it holds anything else."""
        value = self.field(*names)
        if not isinstance(value, list):
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold a list, not {_shown(value)}"
            raise DataError(msg)
        return value

    def records(self, *names: str) -> Iterator[Record]:
        """Yield the objects of a field that holds a list of them, each with its place."""
        for number, value in enumerate(self.list(*names), 1):
            yield as_record(f"{self.where}, {names[0]} {number}", value)

    def words(self, *names: str) -> tuple[str, ...]:
        """Return a field that holds a list of texts; raises `DataError` where it holds anything else."""
        value = self.list(*names)
        if not all(isinstance(word, str) and word.strip() for word in value):
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold words, not {_shown(value)}"
            raise DataError(msg)
        return tuple(value)

    def identifier(self, *names: str) -> str:
        """Return a field that holds a name or a whole number, as text; raises `DataError` for anything else."""
        value = self.field(*names)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(*names)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, JSON lines or one JSON array, whichever it is; blank lines are skipped.

    Either way one record at a time is held.

    Raises
    ------
    DataError
        Naming file and line where it cannot be read, is not UTF-8, or holds anything but JSON objects.
    """
    with readable(path), path.open("rb") as file:
        if not starts_array(file):
            yield from _lines(path, file)
            return
    from concepts.reading.streams import stream_list

    yield from stream_list(path)


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
    with readable(path), path.open("rb") as file:
        skip_mark(file)
        for where, line in _numbered(path, file):
            try:
                cells = line.decode().rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                msg = f"{where}: not UTF-8 at byte {error.start + 1}: save the file as UTF-8"
                raise DataError(msg) from error
            if not len(fields) <= len(cells) <= len(names):
                msg = f"{where}: {len(cells)} columns between tabs, but {', '.join(names)} are expected"
                raise DataError(msg)
            yield Record(where, dict(zip(names, cells, strict=False)))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system raises on a file into a `DataError` that names it."""
    try:
        yield
    except OSError as error:
        msg = f"file '{path}' cannot be read: {error.strerror or error}"
        raise DataError(msg) from error


def skip_mark(file: BinaryIO) -> None:
    """Go behind a byte-order mark, or stay at the start where there is none."""
    file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)


def starts_array(file: BinaryIO) -> bool:
    """Look at the first character that is not blank, and go back to the start of the text."""
    skip_mark(file)
    start = file.tell()
    first = b" "
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    return first == b"["


def _numbered(path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}: line {number}"
        if len(line) == LONGEST_LINE:
            msg = f"{where} is longer than {LONGEST_LINE} bytes: write one question a line"
            raise DataError(msg)
        if line.strip():
            yield where, line


def _lines(path: Path, file: BinaryIO) -> Iterator[Record]:
    for where, line in _numbered(path, file):
        yield as_record(where, _parsed(where, line))


def _parsed(where: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        msg = f"{where}: not UTF-8 at byte {error.start + 1}: save the file as UTF-8"
        raise DataError(msg) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in data.strip() else f"column {error.colno}"
        why = error.msg.removesuffix(" starting at")
        cut = "" if data.endswith(b"\n") else "; the file ends in this line: was it cut?"
        msg = f"{where}: broken JSON at {place}: {why}{cut}"
        raise DataError(msg) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        msg = f"{where}: JSON that cannot be read: {error}"
        raise DataError(msg) from error


def as_record(where: str, value: Any) -> Record:
    """Return a JSON object as a record; raises `DataError` for anything else."""
    if not isinstance(value, dict):
        msg = f"{where}: expected a JSON object with fields, found {_shown(value)}"
        raise DataError(msg)
    return Record(where, value)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
