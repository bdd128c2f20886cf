"""Large JSON files read a record at a time: memory holds one record, whatever the size of the file.

Records are decoded by the standard library's scanner, where they stand in a window that moves over the file. That is as
fast as a streaming parser in C, gives the exact place of an error, and takes no memory for brackets nested without end:
ijson keeps a path for each open bracket, so that 100 kB of them take more memory than a machine has.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from concepts.reading.record import Record, as_record, is_text
from concepts.reading.text_files import readable, skip_mark
from groundscope.core.errors import DataError
from groundscope.core.user_files import open_regular, unique_keys

if TYPE_CHECKING:
    from rich.progress import Progress

LARGEST_RECORD = 1 << 26
"""Characters of one record that are held; the scene graph of an image has some thousand."""
_WINDOW = 1 << 20
"""Bytes read at a time."""
_SLOW = 1 << 24
"""Bytes from which reading takes long enough to show how far it is."""
_BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a list, or one value that stands under a key of the file's object."""

    key: str | None
    """Key of the list or value; None in a file that is one list."""
    value: Any
    where: str
    """File, list and record, for people."""

    def record(self) -> Record:
        """Return the value as a record; raises `DataError` where it is no JSON object."""
        return as_record(self.where, self.value)


def stream(path: Path, *, whole: bool = False) -> Iterator[Entry]:
    """Yield what a JSON file holds, in its order, one piece at a time.

    A file that is one list gives its entries. A file that is one object gives, key by key, the entries of a list, or
    any other value as one piece; with `whole`, a list under a key is one piece too.

    Raises
    ------
    DataError
        Naming file, record and byte: it is not a regular file, cannot be read, is cut, broken or not UTF-8, holds
        something else, a key twice in one object, or one record of more than `LARGEST_RECORD` characters.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with readable(path), open_regular(path) as file:
        skip_mark(file)
        size = path.stat().st_size
        with Progress(console=console, transient=True, disable=not console.is_terminal or size < _SLOW) as bar:
            bar.add_task(f"reading {path.name}", total=size)
            yield from _Scanner(path, file, bar, whole).entries()


def stream_list(path: Path, key: str | None = None) -> Iterator[Record]:
    """Yield the objects of a list: the file itself, or what stands in it under a key; the rest is read and left out.

    Raises
    ------
    DataError
        As for `stream`; where an entry is no JSON object; where there is no such list.
    """
    found, others = False, {}
    for entry in stream(path):
        if entry.key == key:
            found = True
            yield entry.record()
        else:
            others.setdefault(entry.key)
    if not found and others:
        msg = f"{path}: {missing_list(key)}; it has {', '.join(repr(k) for k in others if k) or 'one list'}"
        raise DataError(msg)


def stream_keyed(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield the JSON objects of a file that holds one under each key.

    Raises
    ------
    DataError
        As for `stream`; where a value is no JSON object, or the file is a list.
    """
    for entry in stream(path, whole=True):
        if entry.key is None:
            msg = f"{path}: expected one JSON object with a record under each id, found a list"
            raise DataError(msg)
        yield entry.key, entry.record()


def missing_list(key: str | None) -> str:
    """Say that a list is not there, or empty."""
    return f"there is nothing in the list '{key}'" if key else "expected one JSON list"


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError for ``NaN`` and ``Infinity``, which Python reads and JSON does not have (``parse_constant``)."""
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)


class _Scanner:
    """A window on a file, and a place in it."""

    def __init__(self, path: Path, file: IO[bytes], bar: Progress, whole: bool) -> None:
        self._path, self._file, self._bar, self._whole = str(path), file, bar, whole
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decoder = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=unique_keys)
        self._text, self._at, self._ended = "", 0, False
        self._read = file.tell()
        """Bytes read so far."""
        self._what = "record 1"

    def entries(self) -> Iterator[Entry]:
        first = self._next()
        if first == "[":
            yield from self._list(None)
        elif first == "{":
            yield from self._object()
        elif first:
            self._fail("expected a JSON list or object")
        if self._next():
            self._fail("something stands behind the end")

    def _object(self) -> Iterator[Entry]:
        seen: set[str] = set()
        self._at += 1
        while self._next() != "}":
            if seen:
                self._expect(",", "',' or '}'")
            self._next()
            self._what = f"key {len(seen) + 1}"
            key = self._value()
            if not is_text(key):
                self._fail("expected a key in quotes, of whole characters")
            self._what = f"record '{key}'"
            if key in seen:
                self._fail("this key was already used")
            seen.add(key)
            self._next()
            self._expect(":", "':'")
            if self._next() == "[" and not self._whole:
                yield from self._list(key)
            else:
                yield Entry(key, self._value(), f"{self._path}: {self._what}")
        self._at += 1

    def _list(self, key: str | None) -> Iterator[Entry]:
        name = f"{key}, record" if key else "record"
        number = 0
        self._at += 1
        self._what = f"{name} 1"
        while self._next() != "]":
            if number:
                self._expect(",", "',' or ']'")
                self._next()
            number += 1
            self._what = f"{name} {number}"
            yield Entry(key, self._value(), f"{self._path}: {self._what}")
            self._what = f"behind {name} {number}"
        self._at += 1

    # -- the window ------------------------------------------------------------------------------------------------------

    def _next(self) -> str:
        """Go to the next character that is not blank, and return it; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _expect(self, character: str, words: str) -> None:
        if self._next() != character:
            self._fail(f"expected {words}")
        self._at += 1

    def _value(self) -> Any:
        """Decode the value that begins here, reading on until it is whole."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                inside = error.pos - self._at
                # Half a value looks like a broken one: only with the rest can they be told apart.
                if len(self._text) - self._at < LARGEST_RECORD and self._more():
                    continue
                self._at += inside
                self._fail(error.msg)
            except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits, nested without end
                self._fail(str(error))
            size = end - self._at  # the window may move
            # A number may go on behind the window, at the longest by 'e+9'.
            if len(self._text) - end < 3 and isinstance(value, int | float) and self._more():
                continue
            self._at += size
            return value

    def _more(self) -> bool:
        """Move the window on; False where the file has ended."""
        if self._ended:
            return False
        kept = self._text[self._at :]
        # As much again as is held: a long record is then scanned a few times, not once for every piece.
        data = self._file.read(max(_WINDOW, len(kept)))
        self._ended = not data
        try:
            self._text = kept + self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            place = self._read - len(self._utf8.getstate()[0]) + error.start + 1
            msg = f"{self._path}: {self._what}: not UTF-8 near byte {place}"
            raise DataError(msg) from error
        self._at = 0
        self._read += len(data)
        self._bar.update(self._bar.task_ids[0], completed=self._read)
        return not self._ended or len(self._text) > len(kept)

    def _fail(self, reason: str) -> NoReturn:
        byte = self._read - len(self._text[self._at :].encode("utf-8", "surrogatepass"))
        if self._ended and (reason.startswith("Unterminated") or not self._text[self._at :].strip()):
            reason = "the file ends in the middle of it: it was cut"
        elif len(self._text) > LARGEST_RECORD and not self._ended:
            reason = f"more than {LARGEST_RECORD} characters in one record, or broken: {reason}"
        msg = f"{self._path}: {self._what}: JSON that cannot be read at byte {byte + 1}: {reason}"
        raise DataError(msg)
