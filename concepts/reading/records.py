"""Records of question and answer files (JSON lines, one JSON array, tables), each with its place for error messages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeGuard

from groundscope.core.errors import DataError
from groundscope.core.user_files import open_regular, unique_keys

LONGEST_LINE = 1 << 20
"""Bytes of a line that may be read into memory; a question has a few hundred."""
LARGEST_INTEGER = 1 << 53
"""Whole numbers up to this size are exact as floats."""
LONGEST_ROW = 1 << 26
"""Bytes of one row of a table with a heading; tables may hold images as base64."""
NOT_AVAILABLE = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
    | {"NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""Cells that pandas reads as missing (`pandas.read_csv`, ``na_values``)."""
SEPARATORS = {".tsv": "\t", ".csv": ","}
"""Ending of a table's file name to what stands between its cells."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One object of a file."""

    where: str
    """File, and line or place in the array, for people."""
    values: dict[str, Any]
    table: bool = False
    """Whether it is a row of a table, whose cells are text or None."""

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
        if not is_text(value) or not value.strip():
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold words, not {_shown(value)}"
            raise DataError(msg)
        return value

    def numbers(self, *names: str) -> tuple[float, ...]:
        """Return fields that each hold a finite number; raises `DataError` where one holds anything else.

        A whole number beyond 2**53 is refused, because a float would hold another one.
        """
        found = []
        for name in names:
            value = self.field(name)
            if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                msg = f"{self.where}: field '{name}': a whole number beyond 2**53 cannot be kept exactly"
                raise DataError(msg)
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
        if not all(is_text(word) and word.strip() for word in value):
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
        Naming file and line where it is not a regular file, cannot be read, is not UTF-8, or holds anything but JSON
        objects without repeated keys.
    """
    with readable(path), open_regular(path) as file:
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
    with readable(path), open_regular(path) as file:
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with readable(path), open_regular(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 16):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system raises on a file into a `DataError` that names it."""
    try:
        yield
    except OSError as error:
        msg = f"file '{path}' cannot be read: {error.strerror or error}"
        raise DataError(msg) from error


def skip_mark(file: IO[bytes]) -> None:
    """Go behind a byte-order mark, or stay at the start where there is none."""
    file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)


def starts_array(file: IO[bytes]) -> bool:
    """Look at the first character that is not blank, and go back to the start of the text."""
    skip_mark(file)
    start = file.tell()
    first = b" "
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    return first == b"["


def _numbered(path: Path, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}: line {number}"
        if len(line) == LONGEST_LINE:
            msg = f"{where} is longer than {LONGEST_LINE} bytes: write one question a line"
            raise DataError(msg)
        if line.strip():
            yield where, line


def _lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for where, line in _numbered(path, file):
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


def as_record(where: str, value: Any) -> Record:
    """Return a JSON object as a record; raises `DataError` for anything else."""
    if not isinstance(value, dict):
        msg = f"{where}: expected a JSON object with fields, found {_shown(value)}"
        raise DataError(msg)
    return Record(where, value)


def is_text(value: object) -> TypeGuard[str]:
    r"""Say whether a value is text that can be written as UTF-8; a ``\\ud800`` of JSON alone is half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError for ``NaN`` and ``Infinity``, which Python reads and JSON does not have (``parse_constant``)."""
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
