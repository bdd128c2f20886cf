"""Text files of users: lines with their numbers, byte-order marks, digests, and errors that name the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from groundscope.core.errors import DataError
from groundscope.core.user_files import open_regular

LONGEST_LINE = 1 << 20
"""Limit in bytes of one line; a question has a few hundred bytes."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file; raises `DataError` if it cannot be read."""
    with readable(path), open_regular(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 16):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert a system error while reading a file into a `DataError` that names the file."""
    try:
        yield
    except OSError as error:
        msg = f"file '{path}' cannot be read: {error.strerror or error}"
        raise DataError(msg) from error


def skip_byte_order_mark(file: IO[bytes]) -> None:
    """Move a file that was just opened to the start of its text."""
    file.seek(len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0)


def numbered_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield each line that is not blank, with the file and line number for messages.

    Raises
    ------
    DataError
        For a line of `LONGEST_LINE` bytes or more.
    """
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}: line {number}"
        if len(line) == LONGEST_LINE:
            msg = f"{where} is longer than {LONGEST_LINE} bytes; write one question per line"
            raise DataError(msg)
        if line.strip():
            yield where, line
