"""The seal of a file: digests of all its bytes, appended to it, so that damage is detected before HDF5 parses a byte.

HDF5 is not robust against damaged files: it can loop forever or crash the process. It ignores bytes after its own; a sealed
file has there ::

    HDF5 bytes            ``length`` bytes
    block table           ``count`` records of 20 bytes: offset uint64, size uint64, CRC-32 uint32; little-endian, by offset
    trailer, 104 bytes    SHA-256 of the HDF5 bytes outside the blocks; ``length`` uint64; ``count`` uint64; ``rows`` uint64;
                          the digest of the file; the text ``activation-seal1``

The blocks are bytes that HDF5 never parses: the values of arrays, chunk by chunk, digested in memory while they were
written. The digest of the file is the SHA-256 over all bytes of the seal before it (the block table, then the trailer up to
the digest): it depends on every byte of the file, and no byte is read twice to compute it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError
from groundscope.core.user_files import open_regular

_MAGIC = b"activation-seal1"
_HEAD = struct.Struct("<32sQQQ")
_TRAILER_BYTES = _HEAD.size + 32 + len(_MAGIC)
BLOCK = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc", "<u4")])
"""One record of the block table."""
_READ = 1 << 20


@dataclass(frozen=True)
class Seal:
    """The digests at the end of a sealed file."""

    structure: bytes
    """SHA-256 of the HDF5 bytes outside the blocks."""
    length: int
    """Number of HDF5 bytes."""
    rows: int
    """Number of examples in the file; can be 0."""
    blocks: np.ndarray
    """Records of `BLOCK`, by offset, without overlap."""
    digest: str
    """Digest of the whole file."""


def block_table(offsets: np.ndarray, sizes: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Return sorted `BLOCK` records for blocks with these offsets, sizes and CRC-32 values (arrays of one shape)."""
    table = np.empty(offsets.size, BLOCK)
    table["offset"], table["size"], table["crc"] = offsets.ravel(), sizes.ravel(), digests.ravel()
    return table[np.argsort(table["offset"], kind="stable")]


def write_seal(path: Path, blocks: np.ndarray, rows: int = 0) -> str:
    """Append the seal to a finished HDF5 file, sync it, and return the digest of the file.

    Parameters
    ----------
    path
        The file, closed.
    blocks
        The result of `block_table`.
    rows
        Examples in the file.
    """
    length = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        structure = _structure(file, blocks, length)
    head = blocks.tobytes() + _HEAD.pack(structure, length, len(blocks), rows)
    digest = hashlib.sha256(head).digest()
    with path.open("ab") as file:
        file.write(head + digest + _MAGIC)
        file.flush()
        os.fsync(file.fileno())
    return digest.hex()


def seal_digest(path: Path) -> str | None:
    """Return the digest at the end of a file, without verifying it; None if the file has no seal."""
    with open_regular(path, error=StoreError) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 32 - len(_MAGIC)))
        end = file.read()
    return end[:32].hex() if len(end) == 32 + len(_MAGIC) and end.endswith(_MAGIC) else None


def read_seal(path: Path) -> Seal | None:
    """Read the seal of a file; None if it has no seal.

    Raises
    ------
    DamagedFileError
        If the seal is inconsistent.
    OSError
        If the file cannot be read.
    """
    with open_regular(path, error=StoreError) as file:
        return _read_seal(path, file)


def _read_seal(path: Path, file: IO[bytes]) -> Seal | None:
    size = os.fstat(file.fileno()).st_size
    if size < _TRAILER_BYTES:
        return None
    file.seek(size - _TRAILER_BYTES)
    trailer = file.read(_TRAILER_BYTES)
    if not trailer.endswith(_MAGIC):
        return None
    structure, length, count, rows = _HEAD.unpack_from(trailer)
    digest = trailer[_HEAD.size : _HEAD.size + 32]
    if length + count * BLOCK.itemsize + _TRAILER_BYTES != size:
        msg = f"{path}: damaged, its seal does not fit its size of {size} bytes"
        raise DamagedFileError(msg)
    file.seek(length)
    table = file.read(count * BLOCK.itemsize)
    if hashlib.sha256(table + trailer[: _HEAD.size]).digest() != digest:
        msg = f"{path}: damaged, its seal has changed bytes"
        raise DamagedFileError(msg)
    blocks = np.frombuffer(table, BLOCK)
    ends = blocks["offset"] + blocks["size"]
    starts = np.append(blocks["offset"], np.uint64(length))
    if (ends < blocks["offset"]).any() or (starts[1:] < ends).any():
        msg = f"{path}: damaged, the blocks of its seal overlap"
        raise DamagedFileError(msg)
    return Seal(structure, length, rows, blocks, digest.hex())


def structure_is_whole(path: Path, seal: Seal) -> bool:
    """Whether the bytes that HDF5 parses are unchanged since sealing."""
    with open_regular(path, error=StoreError) as file:
        return _structure(file, seal.blocks, seal.length) == seal.structure


def changed_blocks(path: Path, seal: Seal) -> list[int]:
    """Return the numbers of the blocks whose bytes changed after sealing."""
    out = []
    with open_regular(path, error=StoreError) as file:
        for number, (offset, size, expected) in enumerate(seal.blocks.tolist()):
            file.seek(offset)
            crc = 0
            for part in _parts(file, size):
                crc = zlib.crc32(part, crc)
            if crc != expected:
                out.append(number)
    return out


def _structure(file: Any, blocks: np.ndarray, length: int) -> bytes:
    digest, at = hashlib.sha256(), 0
    for start, size in zip(blocks["offset"].tolist(), blocks["size"].tolist(), strict=True):
        if start > at:
            file.seek(at)
            for part in _parts(file, start - at):
                digest.update(part)
        at = max(at, start + size)
    file.seek(at)
    for part in _parts(file, length - at):
        digest.update(part)
    return digest.digest()


def _parts(file: Any, size: int) -> Iterator[bytes]:
    while size > 0:
        part = file.read(min(size, _READ))
        if not part:
            return
        yield part
        size -= len(part)
