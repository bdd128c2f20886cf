"""File locks between processes, with the identity of the holder.

Locks are `flock` locks on an open file. The system releases them when the process ends in any way, so there are no stale
locks and no timeouts. The content of the file (process, host, time) is for messages only. Locks work between machines if
the file system supports it: NFS since Linux 2.6.12 unless mounted with ``nolock``, Lustre if mounted with ``flock``. A
file system without locks is an error.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from groundscope.core.errors import ConfigError
from groundscope.core.paths import is_file, is_link
from groundscope.core.user_files import read_json

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
        if not is_file(path):
            return False
        with path.open("r", encoding="utf-8") as file:
            return not _take(file, fcntl.LOCK_SH, path)
    except OSError:
        return False


@contextmanager
def lock(
    path: Path,
    *,
    shared: bool = False,
    refuse: Callable[[str], str] | None = None,
    waiting: Callable[[str], None] = lambda _: None,
    transient: bool = False,
) -> Iterator[None]:
    """Hold a lock while the context is open.

    Parameters
    ----------
    path
        The lock file; created if it does not exist.
    shared
        Whether to allow other shared holders.
    refuse
        Returns the error message, given the holder, if the lock is held; None to wait instead.
    waiting
        Called once with the holder before the wait.
    transient
        Whether to remove the file at the end.

    Raises
    ------
    ConfigError
        If the lock is held and `refuse` is given, or the file system has no locks.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        file = _opened(path)
        try:
            if not _take(file, mode, path):
                if refuse is not None:
                    raise ConfigError(refuse(holder(path)))
                waiting(holder(path))
                fcntl.flock(file, mode)
            # The previous holder may have removed the file: then this lock is void, and the new file must be locked.
            if is_file(path) and os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    with file:
        record = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")}
        file.truncate(0)
        file.write(json.dumps(record))
        file.flush()
        try:
            yield
        finally:
            if transient:
                path.unlink(missing_ok=True)


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Do not follow a link, and do not block on a FIFO.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if is_link(path):
            msg = f"the lock file '{path}' is a symbolic link; remove it"
            raise ConfigError(msg) from error
        msg = f"'{path.parent}' cannot be written: {error.strerror}; choose a writable folder (root=…, name=…)"
        raise ConfigError(msg) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        msg = f"the lock file '{path}' is a FIFO or device; remove it"
        raise ConfigError(msg)
    # Not "w", which would erase the holder. NFS needs read access for shared and write access for exclusive locks.
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def _take(file: IO[str], mode: int, path: Path) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        msg = f"the file system of '{path}' has no locks ({error.strerror}); choose a folder on another file system (root=…)"
        raise ConfigError(msg) from error
    return True
