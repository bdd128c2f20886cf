"""Read large JSON files one record at a time, so that memory contains one record, independent of the size of the file.

The standard library's decoder reads each record from a window that moves over the file. This is as fast as a streaming
parser in C, gives the exact position of an error, and needs no memory for deeply nested brackets: ijson stores a path for
each open bracket, so 100 kB of brackets exhaust the memory.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from concepts.reading.record import Record, as_record, is_text
from concepts.reading.text_files import readable, skip_byte_order_mark
from groundscope.core.errors import DataError
from groundscope.core.progress import display
from groundscope.core.user_files import open_regular, unique_keys

if TYPE_CHECKING:
    from rich.progress import Progress

LARGEST_RECORD = 1 << 26
"""Limit in characters of one record; the scene graph of an image has a few thousand."""
_WINDOW = 1 << 20
"""Bytes read at a time."""
_SHOW_PROGRESS_FROM = 1 << 24
"""Size in bytes of files that take more than a second to read."""
_BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a list in a JSON file, or one value of the file's object."""

    key: str | None
    """Key of the list or value in the file's object; None if the file is one list."""
    value: Any
    where: str
    """File, list and number of the record, for error messages."""

    def record(self) -> Record:
        """Return the value as a record; raises `DataError` if it is not a JSON object."""
        return as_record(self.where, self.value)


def stream(path: Path, *, whole: bool = False) -> Iterator[Entry]:
    """Yield the entries of a JSON file in order, one at a time.

    Of a file that is one list, the entries of the list. Of a file that is one object, for each key, the entries of its
    list, or its value if that is not a list.

    Parameters
    ----------
    path
        The file.
    whole
        Yield each value of the file's object as one entry, lists included.

    Raises
    ------
    DataError
        Names the file, record and byte: if it is not a regular file, cannot be read, is truncated, is not valid JSON in
        UTF-8, is neither a list nor an object, repeats a key in one object, or has a record of more than `LARGEST_RECORD`
        characters.
    """
    with readable(path), open_regular(path) as file:
        skip_byte_order_mark(file)
        size = path.stat().st_size
        with display(show=None if size >= _SHOW_PROGRESS_FROM else False) as bar:
            bar.add_task(f"reading {path.name}", total=size)
            yield from _Scanner(path, file, bar, whole).entries()


def stream_list(path: Path, key: str | None = None) -> Iterator[Record]:
    """Yield the objects of one list as records; other parts of the file are read and ignored.

    Parameters
    ----------
    path
        The file.
    key
        Key of the list in the file's object; None if the file is the list.

    Raises
    ------
    DataError
        As for `stream`; also if an entry is not a JSON object, or there is no such list.
    """
    is_empty, other_keys = True, {}
    for entry in stream(path):
        if entry.key == key:
            is_empty = False
            yield entry.record()
        else:
            other_keys.setdefault(entry.key)
    if is_empty and other_keys:
        msg = f"{path}: {missing_list(key)}; it has {', '.join(repr(k) for k in other_keys if k) or 'one list'}"
        raise DataError(msg)


def stream_keyed(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield each key of a file's object with its value, which must be a JSON object, as a record.

    Raises
    ------
    DataError
        As for `stream`; also if a value is not a JSON object, or the file is a list.
    """
    for entry in stream(path, whole=True):
        if entry.key is None:
            msg = f"{path}: expected one JSON object with a record for each id, found a list"
            raise DataError(msg)
        yield entry.key, entry.record()


def missing_list(key: str | None) -> str:
    """Return the message for a list that is missing or empty."""
    return f"the list '{key}' is missing or empty" if key else "expected one JSON list"


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError for ``NaN`` and ``Infinity``, which Python accepts but JSON does not have (``parse_constant``)."""
    msg = f"{name} is not a number in JSON"
    raise ValueError(msg)


class _Scanner:
    """A window on a file, and a position in the window."""

    def __init__(self, path: Path, file: IO[bytes], bar: Progress, whole: bool) -> None:
        self._path, self._file, self._bar, self._whole = str(path), file, bar, whole
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decoder = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=unique_keys)
        self._text, self._position, self._ended = "", 0, False
        self._bytes_read = file.tell()
        self._entry = "record 1"
        """Name of the current entry, for messages."""

    def entries(self) -> Iterator[Entry]:
        first = self._next()
        if first == "[":
            yield from self._list(None)
        elif first == "{":
            yield from self._object()
        elif first:
            self._fail("expected a JSON list or object")
        if self._next():
            self._fail("unexpected data after the end")

    def _object(self) -> Iterator[Entry]:
        keys: set[str] = set()
        self._position += 1
        while self._next() != "}":
            if keys:
                self._expect(",", "',' or '}'")
            self._next()
            self._entry = f"key {len(keys) + 1}"
            key = self._value()
            if not is_text(key):
                self._fail("expected a key in quotes, without lone surrogates")
            self._entry = f"record '{key}'"
            if key in keys:
                self._fail("this key was already used")
            keys.add(key)
            self._next()
            self._expect(":", "':'")
            if self._next() == "[" and not self._whole:
                yield from self._list(key)
            else:
                yield Entry(key, self._value(), f"{self._path}: {self._entry}")
        self._position += 1

    def _list(self, key: str | None) -> Iterator[Entry]:
        name = f"{key}, record" if key else "record"
        number = 0
        self._position += 1
        self._entry = f"{name} 1"
        while self._next() != "]":
            if number:
                self._expect(",", "',' or ']'")
                self._next()
            number += 1
            self._entry = f"{name} {number}"
            yield Entry(key, self._value(), f"{self._path}: {self._entry}")
            self._entry = f"after {name} {number}"
        self._position += 1

    # -- the window ------------------------------------------------------------------------------------------------------

    def _next(self) -> str:
        """Move to the next character that is not blank, and return it; empty at the end of the file."""
        while True:
            while self._position < len(self._text):
                if self._text[self._position] not in _BLANK:
                    return self._text[self._position]
                self._position += 1
            if not self._more():
                return ""

    def _expect(self, character: str, description: str) -> None:
        if self._next() != character:
            self._fail(f"expected {description}")
        self._position += 1

    def _value(self) -> Any:
        """Decode the value at the position, reading more of the file until the value is complete."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                offset = error.pos - self._position
                # An incomplete value looks like an invalid one, so read more before reporting an error.
                if len(self._text) - self._position < LARGEST_RECORD and self._more():
                    continue
                self._position += offset
                self._fail(error.msg)
            except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits, deep nesting
                self._fail(str(error))
            size = end - self._position  # the window may move
            # A number at the end of the window may continue, for example with 'e+9'.
            if len(self._text) - end < 3 and isinstance(value, int | float) and self._more():
                continue
            self._position += size
            return value

    def _more(self) -> bool:
        """Move the window forward; return False at the end of the file."""
        if self._ended:
            return False
        remainder = self._text[self._position :]
        # Double the window, so that a long record is decoded a few times, not once for each megabyte.
        data = self._file.read(max(_WINDOW, len(remainder)))
        self._ended = not data
        try:
            self._text = remainder + self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            byte = self._bytes_read - len(self._utf8.getstate()[0]) + error.start + 1
            msg = f"{self._path}: {self._entry}: not UTF-8 near byte {byte}; save the file as UTF-8"
            raise DataError(msg) from error
        self._position = 0
        self._bytes_read += len(data)
        self._bar.update(self._bar.task_ids[0], completed=self._bytes_read)
        return not self._ended or len(self._text) > len(remainder)

    def _fail(self, reason: str) -> NoReturn:
        byte = self._bytes_read - len(self._text[self._position :].encode("utf-8", "surrogatepass"))
        if self._ended and (reason.startswith("Unterminated") or not self._text[self._position :].strip()):
            reason = "the file ends inside this entry; it is truncated"
        elif len(self._text) > LARGEST_RECORD and not self._ended:
            reason = f"more than {LARGEST_RECORD} characters in one record, or invalid: {reason}"
        msg = f"{self._path}: {self._entry}: invalid JSON at byte {byte + 1}: {reason}"
        raise DataError(msg)
