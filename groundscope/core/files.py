"""Atomic file writes, digests, canonical JSON, and errors that state the reason."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from groundscope.core.errors import StoreError
from groundscope.core.paths import create_part, is_file, part_path

_ERRNO = re.compile(r"errno = (\d+)")


class DamagedFileError(StoreError):
    """A file whose bytes do not match their digest."""


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a complete, synced file to its final name, and flush the folder to disk."""
    temporary.replace(final)
    sync(final.parent)


def publish_new(temporary: Path, final: Path) -> None:
    """Rename as `publish`, but never replace a file; raise FileExistsError if the name exists."""
    try:
        # Creating a hard link is atomic and fails if the name exists; a rename would replace the file.
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
        temporary.replace(final)
    else:
        temporary.unlink()
    sync(final.parent)


def part_of(path: Path, owner: str = "") -> Path:
    """Return a temporary name for writing a file; it contains `owner`, to identify the process later."""
    return part_path(path, owner)


def write_whole(path: Path, data: bytes, owner: str = "") -> None:
    """Write a file atomically: readers see the old or the new content; does nothing if the content is equal.

    A link at `path` is replaced, not followed. An OSError names `path`.
    """
    if is_file(path) and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    temporary = None
    try:
        temporary, file = create_part(path, owner)
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # errors of an open descriptor name no file
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by `write_whole`, in any locale; lone surrogates are written as escapes."""
    write_whole(path, text.encode("utf-8", errors="backslashreplace"))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty temporary file; rename it to `path` when the block ends without error.

    The temporary name is random, so code that opens it by name cannot be redirected by a link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = create_part(path)
    file.close()
    try:
        yield temporary
        sync(temporary)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether both files exist and have equal content."""
    return a.is_file() and b.is_file() and a.stat().st_size == b.stat().st_size and file_digest(a) == file_digest(b)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def system_number(error: BaseException) -> int | None:
    """Return the errno of a system error, None for other errors; HDF5 states it only in its message."""
    number = getattr(error, "errno", None)
    if number is None and isinstance(error, OSError | RuntimeError) and (match := _ERRNO.search(str(error))):
        number = int(match[1])
    return number


def too_many_files(error: BaseException | None) -> bool:
    """Whether the limit of open files of the process or the system is reached."""
    return error is not None and system_number(error) in (errno.EMFILE, errno.ENFILE)


def system_reason(error: OSError | RuntimeError) -> str:
    """Return the reason of a system error as text."""
    number = system_number(error)
    return os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def explained(message: Callable[[str], str]) -> Iterator[None]:
    """Convert a system or HDF5 error into a `StoreError`; `message` returns its text, given the reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StoreError(message(system_reason(error))) from error


def canonical_json(value: object) -> str:
    """Return the canonical JSON text of a value: sorted keys, indent 1, ASCII.

    Raises
    ------
    StoreError
        If the value is not JSON-serializable: text, finite numbers, booleans, None, lists, mappings.
    """
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        msg = f"provenance must be plain JSON (text, finite numbers, booleans, None, lists, mappings): {error}"
        raise StoreError(msg) from error
