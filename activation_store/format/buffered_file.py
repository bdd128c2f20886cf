"""A file object for HDF5 to write to, so that write errors reach this package and not HDF5.

HDF5 cannot close a file after a failed write: its handles then fail repeatedly and can crash the process. Here the data of
a failed write stays in memory and the error is recorded; HDF5 continues as if the write had succeeded, and the owner of
the file calls `check` before trusting it.

A forked child process writes nothing: the file belongs to the parent, and HDF5 must close it there without a change.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import h5py
from h5py._objects import phil


class BufferedFile:
    """A new file, with the methods that h5py requires of a file-like object.

    Raises
    ------
    OSError
        If the file cannot be created, or exists.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        self._owner = os.getpid()
        self._position = 0
        self._end = 0
        self._write_error: OSError | None = None
        self._unwritten: dict[int, bytes] = {}

    def check(self) -> None:
        """Raise the error of the first failed write, if any."""
        if self._write_error is not None:
            raise self._write_error

    def sync(self) -> None:
        """Flush all data to the disk (fsync); raise OSError, also for earlier failed writes."""
        self.check()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; can be called repeatedly."""
        # The number is dropped first: a process that is forked in between would close a descriptor that is not its own.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, relative to the start, the current position or the end."""
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def write(self, data: memoryview) -> int:
        """Write at the position and advance it; never raise."""
        view = memoryview(data).cast("B")
        done = 0 if os.getpid() == self._owner else len(view)
        try:
            while done < len(view) and self._write_error is None:
                done += os.pwrite(self._descriptor, view[done:], self._position + done)
        except OSError as error:
            self._write_error = error
        if done < len(view):
            self._unwritten[self._position + done] = bytes(view[done:])
        self._position += len(view)
        self._end = max(self._end, self._position)
        return len(view)

    def readinto(self, buffer: memoryview) -> int:
        """Read from the position and advance it."""
        view = memoryview(buffer).cast("B")
        data = os.pread(self._descriptor, len(view), self._position)
        view[: len(data)] = data
        view[len(data) :] = bytes(len(view) - len(data))
        for start, block in self._unwritten.items():
            first, last = max(start, self._position), min(start + len(block), self._position + len(view))
            if first < last:
                view[first - self._position : last - self._position] = block[first - start : last - start]
        self._position += len(view)
        return len(view)

    def read(self, size: int) -> bytes:
        """Return bytes from the position and advance it; h5py checks for this method but calls `readinto`."""
        data = bytearray(size)
        self.readinto(memoryview(data))
        return bytes(data)

    def truncate(self, size: int) -> int:
        """Set the size; never raise."""
        try:
            if os.getpid() == self._owner:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self._write_error = self._write_error or error
        self._end = size
        return size

    def flush(self) -> None:
        """Do nothing: there is no write buffer."""


@contextmanager
def create_hdf5(path: Path) -> Iterator[h5py.File]:
    """Create an HDF5 file for writing; sync it when the block ends.

    Raises
    ------
    OSError
        If the file cannot be created, exists, or a write failed.
    """
    with closing(BufferedFile(path)) as raw_file:
        with open_hdf5(raw_file, "w") as file:
            yield file
        raw_file.sync()


def open_hdf5(raw_file: Any, mode: str) -> h5py.File:
    """Open an HDF5 file on a file-like object, so that no fork falls between the steps.

    h5py stores a reference to the Python object in a property list of HDF5. If another thread forked before the file owned
    that list, nothing in the child would keep the object alive, and the child would crash when HDF5 closes its files.

    Raises
    ------
    OSError
        If the object does not hold an HDF5 file.
    """
    with phil:
        return h5py.File(raw_file, mode)


@cache
def hold_hdf5_while_forking() -> None:
    """Make every later fork wait until no thread is inside HDF5, and let the child close its copies of open files.

    h5py guards HDF5 with one lock. If a thread held it during a fork, the child would wait for it forever, at the latest
    when its interpreter exits.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=phil.acquire, after_in_parent=phil.release, after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    phil.release()
    atexit.register(_close_open_files)


def _close_open_files() -> None:
    """Close every HDF5 file while Python still runs: HDF5's own exit would call file objects that no longer exist."""
    with phil:
        for file_id in h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
            with suppress(OSError, RuntimeError, ValueError):
                h5py.File(file_id).close()
