"""Read user files safely: regular files only, of limited size, UTF-8, JSON without duplicate keys.

A path from a user or from another file may name a FIFO, which blocks forever, a device, which never ends, or a file
larger than memory. Each reader here checks the open descriptor, not the name, before it reads a byte.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from typing import IO, Any

from groundscope.core.errors import DataError, GroundscopeError

MAX_JSON_BYTES = 1 << 30
"""Limit of `read_text` and `read_json`; larger annotation files are streamed by their loaders."""


def open_regular(path: str | os.PathLike[str], *, error: type[GroundscopeError] = DataError) -> IO[bytes]:
    """Open a regular file for reading bytes.

    Parameters
    ----------
    path
        The file; a symbolic link to a regular file is followed.
    error
        The class of the exception for anything but a missing or unreadable file.

    Returns
    -------
    binary file
        Open at its start; the caller closes it.

    Raises
    ------
    GroundscopeError
        An `error` if the path is a directory, FIFO, socket or device.
    OSError
        If the file is missing or cannot be read, as from `open`.
    """
    # O_NONBLOCK: opening a FIFO without a writer must not block.
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as reason:  # a NUL, or a lone surrogate, in the path
        msg = f"{os.fspath(path)!r}: not a file path: {reason}"
        raise error(msg) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            msg = f"{path} is not a regular file but a {_kind(mode)}"
            raise error(msg)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(
    path: str | os.PathLike[str], *, limit: int = MAX_JSON_BYTES, error: type[GroundscopeError] = DataError
) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises as `open_regular` does, and `error` for a larger file."""
    with open_regular(path, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            msg = f"{path} has {size} bytes, more than the limit of {limit}"
            raise error(msg)
        return file.read(size)  # not the limit, which would allocate a buffer of that size


def read_text(
    path: str | os.PathLike[str], *, limit: int = MAX_JSON_BYTES, error: type[GroundscopeError] = DataError
) -> str:
    """Read a regular UTF-8 file, in any locale. Raises what `read_bytes` raises, and `error` for other encodings."""
    data = read_bytes(path, limit=limit, error=error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        msg = f"{path} is not UTF-8 at byte {reason.start}"
        raise error(msg) from None


def read_json(
    path: str | os.PathLike[str],
    *,
    check: Callable[[Any], str | None] | None = None,
    limit: int = MAX_JSON_BYTES,
    error: type[GroundscopeError] = DataError,
) -> Any:
    """Read one JSON document from a regular UTF-8 file.

    Parameters
    ----------
    path
        The file.
    check
        Returns the problem of the document, or None if it is valid.
    limit
        Largest accepted size in bytes.
    error
        The class of the exception.

    Raises
    ------
    GroundscopeError
        An `error` that names the file and the position, for invalid JSON, a duplicate key in one object, too deep nesting,
        or a problem that `check` returns.
    OSError
        If the file is missing or cannot be read.
    """
    text = read_text(path, limit=limit, error=error)
    try:
        document = parse_json(text)
    except (ValueError, RecursionError) as reason:
        what = "nested too deeply" if isinstance(reason, RecursionError) else str(reason)
        msg = f"{path}: invalid JSON: {what}"
        raise error(msg) from None
    if check is not None and (problem := check(document)) is not None:
        msg = f"{path}: {problem}"
        raise error(msg)
    return document


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError also for a duplicate key in one object, which Python drops silently."""
    return json.loads(text, object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict: an `object_pairs_hook` that raises ValueError for a repeated key."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        msg = f"the key {repeated!r} occurs twice in one object"
        raise ValueError(msg)
    return table


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "directory"),
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "character device"),
        (stat.S_ISBLK, "block device"),
    ):
        if test(mode):
            return name
    return "special file"
