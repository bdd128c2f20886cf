"""A sealed file as HDF5 reads it: through memory that the system maps, without HDF5's locks.

HDF5 refuses to open a file a second time in a process where somebody opened it under other locking rules, and locks fail
on some read-only and network file systems. Sealed files never change, so none is needed.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError
from groundscope.core.user_files import open_regular


class Source:
    """A file mapped into memory, with the methods that h5py asks of a file-like object.

    Raises
    ------
    DamagedFileError
        Where it is empty.
    StoreError
        Where it is not a regular file.
    OSError
        Where it cannot be opened or mapped.
    """

    def __init__(self, path: Path) -> None:
        with open_regular(path, error=StoreError) as file:
            if not os.fstat(file.fileno()).st_size:
                msg = f"{path}: damaged or truncated, it is empty"
                raise DamagedFileError(msg)
            self.raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self.screened = False
        """Whether its digests were compared, so that HDF5 may parse it."""
        # What is wanted of a layer or a table lies in pieces: around a byte that is touched the system would read
        # megabytes that nobody asked for. What is wanted is said with `soon` instead.
        self._advise("MADV_RANDOM")

    def soon(self, start: int, size: int) -> None:
        """Have the system begin to read some bytes, all at once and not page by page as each is touched."""
        page = start - start % mmap.PAGESIZE
        self._advise("MADV_WILLNEED", page, min(start + size, len(self.raw)) - page)

    def in_order(self) -> None:
        """Let the system read ahead: what is wanted lies in one piece."""
        self._advise("MADV_NORMAL")

    def _advise(self, name: str, *where: int) -> None:
        advice = getattr(mmap, name, None)  # not every system has it
        if advice is not None:
            self.raw.madvise(advice, *where)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place, counted from the start, from here or from the end."""
        self._at = offset + (0, self._at, len(self.raw))[whence]
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Read from the place and move on."""
        view = memoryview(buffer).cast("B")
        if len(view) > mmap.PAGESIZE:
            self.soon(self._at, len(view))
        data = self.raw[self._at : self._at + len(view)]
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def read(self, size: int) -> bytes:
        """Return bytes from the place and move on; h5py wants to see the method, and uses the other."""
        data = self.raw[self._at : self._at + size]
        self._at += len(data)
        return data

    def flush(self) -> None:
        """Do nothing: nothing is written."""
