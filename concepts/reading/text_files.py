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
"""Bytes of a line that may be read into memory; a question has a few hundred."""
_BOM = b"\xef\xbb\xbf"


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


def numbered_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield each line that is not blank with its file and number; raises `DataError` for one of `LONGEST_LINE` bytes."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}: line {number}"
        if len(line) == LONGEST_LINE:
            msg = f"{where} is longer than {LONGEST_LINE} bytes: write one question a line"
            raise DataError(msg)
        if line.strip():
            yield where, line
