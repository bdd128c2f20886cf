"""Locks on files: who is at work, and a door for one at a time.

They are `flock` locks, held by the open file and freed by the system when its process ends, however it ends: a lock left
by a dead process is free, and no age has to be guessed. What is written in the file (process, machine, time) is for
people only. Between machines they hold where the file system passes them on: NFS since Linux 2.6.12 unless mounted with
``nolock``, Lustre when mounted with ``flock``. Where a file system has no locks at all, that is an error, not a shrug.
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
    """Say who wrote their name into a lock file last: ``process 123 on host, since 10:31:05``."""
    try:
        found = read_json(path, limit=1 << 12) if is_file(path) else {}
        return f"process {found['process']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def taken(path: Path) -> bool:
    """Say whether somebody holds a lock now."""
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
    """Hold a lock.

    Parameters
    ----------
    path
        Its file, made where it is not there.
    shared
        Let others hold it too who say the same.
    refuse
        Makes the error where somebody holds it, from who that is; without it, wait.
    waiting
        Told who holds it, once, before the wait.
    transient
        Remove the file at the end.

    Raises
    ------
    ConfigError
        Where somebody holds it and `refuse` is given, or the file system cannot lock.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        file = _opened(path)
        try:
            if not _take(file, how, path):
                if refuse is not None:
                    raise ConfigError(refuse(holder(path)))
                waiting(holder(path))
                fcntl.flock(file, how)
            # Who held it may have removed the file meanwhile: then this is a lock on nothing, and another file counts.
            if is_file(path) and os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    with file:
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")}
        file.truncate(0)
        file.write(json.dumps(about))
        file.flush()
        try:
            yield
        finally:
            if transient:
                path.unlink(missing_ok=True)


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link or a FIFO in its place is neither followed nor waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if is_link(path):
            msg = f"'{path}' is a symbolic link, which is not followed: remove it"
            raise ConfigError(msg) from error
        msg = f"'{path.parent}' cannot be written: {error.strerror}; choose a folder that can (root=…, name=…)"
        raise ConfigError(msg) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        msg = f"'{path}' is not a lock file but a FIFO or device: remove it"
        raise ConfigError(msg)
    # Not "w": who holds it stays readable. NFS asks for reading for a shared lock and for writing for the other.
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def _take(file: IO[str], how: int, path: Path) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        msg = f"the file system of '{path}' has no locks ({error.strerror}): choose a folder on another one (root=…)"
        raise ConfigError(msg) from error
    return True
