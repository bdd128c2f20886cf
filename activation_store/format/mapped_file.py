"""A sealed file as a memory map that HDF5 reads without its own file locks.

HDF5 cannot open a file that the same process has already opened with another locking mode, and locks fail on some
read-only and network file systems. Sealed files never change, so they need no locks.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError
from groundscope.core.user_files import open_regular


class MappedFile:
    """A file mapped into memory, with the methods that h5py requires of a file-like object.

    Raises
    ------
    DamagedFileError
        If it is empty.
    StoreError
        If it is not a regular file.
    OSError
        If it cannot be opened or mapped.
    """

    def __init__(self, path: Path) -> None:
        with open_regular(path, error=StoreError) as file:
            if not os.fstat(file.fileno()).st_size:
                msg = f"{path}: damaged or truncated, it is empty"
                raise DamagedFileError(msg)
            self.raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0
        self.screened = False
        """Whether its digests were verified, so that HDF5 can parse it safely."""
        # Reads of a layer or a table are scattered: read-ahead around each page would load megabytes that are not
        # needed. Callers name the required bytes with `prefetch` instead.
        self._advise("MADV_RANDOM")

    def prefetch(self, start: int, size: int) -> None:
        """Tell the system to start reading a range of bytes at once, instead of page by page on access."""
        page = start - start % mmap.PAGESIZE
        self._advise("MADV_WILLNEED", page, min(start + size, len(self.raw)) - page)

    def allow_readahead(self) -> None:
        """Enable the system's read-ahead, for contiguous data."""
        self._advise("MADV_NORMAL")

    def _advise(self, name: str, *where: int) -> None:
        advice = getattr(mmap, name, None)  # not every system has it
        if advice is not None:
            self.raw.madvise(advice, *where)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, relative to the start, the current position or the end."""
        self._position = offset + (0, self._position, len(self.raw))[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Read from the position and advance it."""
        view = memoryview(buffer).cast("B")
        if len(view) > mmap.PAGESIZE:
            self.prefetch(self._position, len(view))
        data = self.raw[self._position : self._position + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read(self, size: int) -> bytes:
        """Return bytes from the position and advance it; h5py checks for this method but calls `readinto`."""
        data = self.raw[self._position : self._position + size]
        self._position += len(data)
        return data

    def flush(self) -> None:
        """Do nothing: the file is read-only."""
