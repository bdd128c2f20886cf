"""Files that are whole or not there, and errors that say what happened to the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from groundscope.core.errors import StoreError
from groundscope.core.paths import create_part, is_file, is_link, part_path

try:
    import fcntl
except ImportError:  # not a Unix: no lock, the unique temporary names still keep files apart
    fcntl = None

_ERRNO = re.compile(r"errno = (\d+)")


class DamagedFileError(StoreError):
    """A file whose bytes are not those that were sealed."""


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete, synced file its final name, and make the name survive a power cut."""
    temporary.replace(final)
    sync(final.parent)


def publish_new(temporary: Path, final: Path) -> None:
    """Do as `publish`, but never replace a file; raises FileExistsError where the name is taken."""
    try:
        # A second name is given in one step or, if somebody has it, not at all; a rename would replace theirs.
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
    """Return the temporary name under which a process writes a file; `owner` tells later whose it was."""
    return part_path(path, owner)


def write_whole(path: Path, data: bytes, owner: str = "") -> None:
    """Write a file so that at every moment it is as before or as after, never half; a no-op where nothing changes.

    A link at `path` is replaced, never written through. An OSError names `path`.
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
            error.filename = str(path)  # what fails on an open descriptor names no file
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by `write_whole`, whatever the locale; lone surrogates are written as escapes."""
    write_whole(path, text.encode("utf-8", errors="backslashreplace"))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a new, empty file to write for code that takes a path; it gets its name once the block has ended without error.

    The name of the new file cannot be foreseen, so what opens it again by that name does not follow a link placed there.
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
    """Whether both files are there and hold the same."""
    return a.is_file() and b.is_file() and a.stat().st_size == b.stat().st_size and file_digest(a) == file_digest(b)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def system_number(error: BaseException) -> int | None:
    """Return the number of a system error, None for others; HDF5 states it only inside its message."""
    number = getattr(error, "errno", None)
    if number is None and isinstance(error, OSError | RuntimeError) and (match := _ERRNO.search(str(error))):
        number = int(match[1])
    return number


def too_many_files(error: BaseException | None) -> bool:
    """Whether the process or the system has as many files open as it may."""
    return error is not None and system_number(error) in (errno.EMFILE, errno.ENFILE)


def system_reason(error: OSError | RuntimeError) -> str:
    """Return in words why the system refused."""
    number = system_number(error)
    return os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def explained(message: Callable[[str], str]) -> Iterator[None]:
    """Turn what the system or HDF5 raises into a `StoreError`; `message` makes its text from the reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StoreError(message(system_reason(error))) from error


class Lock:
    """Holds a file of a folder for this process, so that two writers never take one name; freed even by kill -9.

    The child of a fork never holds it: there `release` only closes the descriptor.

    Raises
    ------
    StoreError
        Where another process holds it, or where a link, FIFO or device is in the file's place. A file system without locks
        has no lock.
    """

    def __init__(self, path: Path, held: str) -> None:
        self._path = path
        self._owner = os.getpid()
        self._descriptor: int | None = None
        if fcntl is None:
            return
        while self._descriptor is None:
            descriptor = _open_lock_file(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise StoreError(held) from error
            except OSError:
                os.close(descriptor)
                return
            # The holder before may have removed the file between our opening and locking it: then lock the new one.
            if is_file(path) and os.path.samestat(path.lstat(), os.fstat(descriptor)):
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def release(self) -> None:
        """Let others have it; may be called again."""
        if self._descriptor is not None:
            if os.getpid() == self._owner:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _open_lock_file(path: Path) -> int:
    """Open a lock file, created where it is missing; a link is not followed, and a FIFO not waited for."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if is_link(path):
            msg = f"'{path}' is a symbolic link, which is not followed: remove it"
            raise StoreError(msg) from error
        if path.is_dir():
            msg = f"'{path}' is not a lock file but a folder: remove it"
            raise StoreError(msg) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        msg = f"'{path}' is not a lock file but a FIFO or device: remove it"
        raise StoreError(msg)
    return descriptor


def canonical_json(value: object) -> str:
    """Return the one text that stands for a value: sorted keys, indent 1, ASCII.

    Raises
    ------
    StoreError
        Where the value is not made of what JSON has: text, finite numbers, booleans, None, lists, mappings.
    """
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        msg = f"provenance must be plain JSON (text, finite numbers, booleans, None, lists, mappings): {error}"
        raise StoreError(msg) from error
