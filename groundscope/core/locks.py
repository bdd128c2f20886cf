"""File locks between processes, with the identity of the holder.

Locks are `flock` locks on an open file. The system releases them when the process ends in any way, so there are no stale
locks and no timeouts. The content of the file (process, host, time) is for messages only. Locks work between machines if
the file system supports it: NFS since Linux 2.6.12 unless mounted with ``nolock``, Lustre if mounted with ``flock``.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.paths import is_file, is_link
from groundscope.core.user_files import read_json

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


def holder(path: Path) -> str:
    """Return the last holder recorded in a lock file: ``process 123 on host, since 10:31:05``."""
    try:
        record = read_json(path, limit=1 << 12) if is_file(path) else {}
        return f"process {record['process']} on {record['host']}, since {record['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock now."""
    try:
        if fcntl is None or not is_file(path):
            return False
        with path.open("r", encoding="utf-8") as file:
            return not _take(file, fcntl.LOCK_SH, path, ConfigError)
    except OSError:
        return False


class FileLock:
    """A lock that this process holds until `release`; see `acquire`."""

    def __init__(self, path: Path, file: IO[str] | None, *, transient: bool) -> None:
        self._path, self._file, self._transient = path, file, transient
        self._owner = os.getpid()

    def release(self) -> None:
        """Release the lock; may be called repeatedly. A forked child does not hold it and only closes its descriptor."""
        if self._file is not None:
            if self._transient and os.getpid() == self._owner:
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def acquire(
    path: Path,
    *,
    required: bool = True,
    shared: bool = False,
    refuse: Callable[[str], str] | None = None,
    waiting: Callable[[str], None] = lambda _: None,
    transient: bool = False,
    error: type[GroundscopeError] = ConfigError,
) -> FileLock:
    """Lock a file for this process, and record the holder in it.

    Parameters
    ----------
    path
        The lock file; created if it does not exist.
    required
        Whether a system or file system without locks is an error; otherwise nothing is locked there.
    shared
        Whether to allow other shared holders.
    refuse
        Returns the error message, given the holder, if the lock is held; None to wait instead.
    waiting
        Called once with the holder before the wait.
    transient
        Whether to remove the file at the end.
    error
        The class of the exception.

    Raises
    ------
    GroundscopeError
        An `error` if the lock is held and `refuse` is given, a link, folder, FIFO or device is in the place of the file, or
        locks are required and the file system has none.
    OSError
        If the file cannot be created.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from groundscope.core.locks import acquire
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     held = acquire(Path(folder) / ".lock", transient=True)
    ...     held.release()
    ...     list(Path(folder).iterdir())
    []
    """
    if fcntl is None:
        if required:
            msg = f"this system has no file locks, which '{path}' needs; use a Unix system"
            raise error(msg)
        return FileLock(path, None, transient=transient)
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        file = _open_lock_file(path, error)
        try:
            free = _take(file, mode, path, error if required else None)
            if free is None:
                file.close()
                return FileLock(path, None, transient=transient)
            if not free:
                if refuse is not None:
                    raise error(refuse(holder(path)))
                waiting(holder(path))
                fcntl.flock(file, mode)
            # The previous holder may have removed the file: then this lock is void, and the new file must be locked.
            if is_file(path) and os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    record = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")}
    with suppress(OSError):  # on a full disk: the record is for messages only
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), json.dumps(record).encode())
    return FileLock(path, file, transient=transient)


@contextmanager
def lock(
    path: Path,
    *,
    shared: bool = False,
    refuse: Callable[[str], str] | None = None,
    waiting: Callable[[str], None] = lambda _: None,
    transient: bool = False,
) -> Iterator[None]:
    """Hold a lock while the context is open; parameters as for `acquire`.

    Raises
    ------
    ConfigError
        As `acquire`; also if the folder of the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire(path, shared=shared, refuse=refuse, waiting=waiting, transient=transient)
    except OSError as error:
        msg = f"'{path.parent}' cannot be written: {error.strerror}; choose a writable folder (root=…, name=…)"
        raise ConfigError(msg) from error
    try:
        yield
    finally:
        lock.release()


def _open_lock_file(path: Path, error: type[GroundscopeError]) -> IO[str]:
    """Open a lock file, created where it is missing; a link is not followed, and a FIFO not waited for."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as reason:
        if is_link(path):
            msg = f"the lock file '{path}' is a symbolic link; remove it"
            raise error(msg) from reason
        if path.is_dir():
            msg = f"the lock file '{path}' is a folder; remove it"
            raise error(msg) from reason
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        msg = f"the lock file '{path}' is a FIFO or device; remove it"
        raise error(msg)
    # Not "w", which would erase the holder. NFS needs read access for shared and write access for exclusive locks.
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def _take(file: IO[str], mode: int, path: Path, error: type[GroundscopeError] | None) -> bool | None:
    """Try to lock an open file; False if it is held, None if `error` is None and the file system has no locks."""
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)  # pyright: ignore[reportOptionalMemberAccess] - checked by the callers
    except OSError as reason:
        if reason.errno in _TAKEN:
            return False
        if error is None:
            return None
        msg = f"the file system of '{path}' has no locks ({reason.strerror}); choose a folder on another file system (root=…)"
        raise error(msg) from reason
    return True
