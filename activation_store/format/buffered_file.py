"""A file that HDF5 writes through us, so that the disk's refusal reaches us and not HDF5.

HDF5 cannot close a file that it could not write: its handles then fail again and again, up to a crash of the process. Here
a write that the system refuses is kept in memory and noted; HDF5 goes on as if nothing had happened, and whoever owns the
file asks `check` before believing in it.

In the child of a fork nothing is written: the file is its parent's, and HDF5 is to let go of it without a change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import h5py
from h5py._objects import phil


class Pen:
    """A new file, with the methods that h5py asks of a file-like object.

    Raises
    ------
    OSError
        Where the file cannot be made, or exists.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        self._owner = os.getpid()
        self._at = 0
        self._end = 0
        self._refused: OSError | None = None
        self._kept: dict[int, bytes] = {}

    def check(self) -> None:
        """Raise what the system answered to the first write that it refused."""
        if self._refused is not None:
            raise self._refused

    def sync(self) -> None:
        """Make what was written survive a power cut; raises OSError, also for what was refused before."""
        self.check()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place, counted from the start, from here or from the end."""
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def write(self, data: memoryview) -> int:
        """Write at the place and move on; never raises."""
        view = memoryview(data).cast("B")
        done = 0 if os.getpid() == self._owner else len(view)
        try:
            while done < len(view) and self._refused is None:
                done += os.pwrite(self._descriptor, view[done:], self._at + done)
        except OSError as error:
            self._refused = error
        if done < len(view):
            self._kept[self._at + done] = bytes(view[done:])
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def readinto(self, buffer: memoryview) -> int:
        """Read from the place and move on."""
        view = memoryview(buffer).cast("B")
        data = os.pread(self._descriptor, len(view), self._at)
        view[: len(data)] = data
        view[len(data) :] = bytes(len(view) - len(data))
        for start, kept in self._kept.items():
            first, last = max(start, self._at), min(start + len(kept), self._at + len(view))
            if first < last:
                view[first - self._at : last - self._at] = kept[first - start : last - start]
        self._at += len(view)
        return len(view)

    def read(self, size: int) -> bytes:
        """Return bytes from the place and move on; h5py wants to see the method, and uses the other."""
        data = bytearray(size)
        self.readinto(memoryview(data))
        return bytes(data)

    def truncate(self, size: int) -> int:
        """Set the size; never raises."""
        try:
            if os.getpid() == self._owner:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self._refused = self._refused or error
        self._end = size
        return size

    def flush(self) -> None:
        """Do nothing: nothing is held back."""


@contextmanager
def written(path: Path) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing; it is synced when the block ends.

    Raises
    ------
    OSError
        Where the file cannot be made, exists, or the system refused a write.
    """
    with closing(Pen(path)) as pen:
        with h5py.File(pen, "w") as file:
            yield file
        pen.sync()


@cache
def hold_hdf5_while_forking() -> None:
    """From now on, fork only while no thread is inside HDF5.

    h5py guards HDF5 with one lock. Where a thread holds it at the moment of a fork, the child would wait for it forever, at
    the latest when the interpreter ends.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=phil.acquire, after_in_parent=phil.release, after_in_child=phil.release)
