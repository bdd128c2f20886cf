"""Digests of a shard: a CRC-32 per chunk of its arrays, a SHA-256 over the other bytes of the file."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store.format.hdf5 import attribute, dataset_at, elements, group_at, groups
from activation_store.format.schema import CHUNK_ROWS

_READ = 1 << 20


@dataclass(frozen=True)
class Blocks:
    """Position of an array's values in its file: blocks of rows, per layer."""

    rows: int
    """Rows per block; the last can hold fewer."""
    offsets: np.ndarray
    """Bytes from the start of the file, int64 [blocks, L]."""
    sizes: np.ndarray
    """Bytes on disk, int64 [blocks, L]: compressed if the array is, and including the padding of the last chunk."""


def blocks(dataset: h5py.Dataset) -> Blocks:
    """Return the position of an array's values; raise KeyError if chunks are missing."""
    if dataset.chunks is None:
        return _contiguous(dataset)
    step = dataset.chunks[0]
    count = -(-len(dataset) // step)
    offsets = np.full((count, dataset.shape[1]), -1, np.int64)
    sizes = np.zeros_like(offsets)

    def record(chunk: h5py.h5d.StoreInfo) -> None:
        row, layer = chunk.chunk_offset[0] // step, chunk.chunk_offset[1]
        offsets[row, layer], sizes[row, layer] = chunk.byte_offset, chunk.size

    if count:
        dataset.id.chunk_iter(record)
    if (offsets < 0).any():
        raise KeyError(dataset.name)
    return Blocks(step, offsets, sizes)


def _contiguous(dataset: h5py.Dataset) -> Blocks:
    layers, n, width = dataset.shape
    start = dataset.id.get_offset()
    if start is None and dataset.size:
        raise KeyError(dataset.name)
    row = width * dataset.dtype.itemsize
    first = np.arange(0, n, CHUNK_ROWS, dtype=np.int64)  # [blocks]
    offsets = (start or 0) + (np.arange(layers)[None, :] * n + first[:, None]) * row
    sizes = np.repeat(np.minimum(CHUNK_ROWS, n - first)[:, None] * row, layers, axis=1)
    return Blocks(CHUNK_ROWS, offsets, sizes)


def values_of(element: h5py.Dataset | h5py.Group) -> h5py.Dataset:
    """Return the dataset with the values of an array, plain or ragged."""
    return dataset_at(element, "values") if isinstance(element, h5py.Group) else element


def arrays_in(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset | h5py.Group]]:
    """Yield the arrays of an open shard by name (``decoder.z/last``)."""
    for group_name, group in groups(group_at(file, "arrays")):
        for tokens, element in elements(group):
            yield f"{group_name}/{tokens}", element


def array_digest(digests: np.ndarray, offsets: np.ndarray | None = None) -> str:
    """Return the digest of an array, from the CRC-32 of its chunks [blocks, L] and, if ragged, its offsets."""
    table = np.ascontiguousarray(digests, "<u4").tobytes()
    return hashlib.sha256(table + (b"" if offsets is None else offsets.astype("<i8").tobytes())).hexdigest()


def read_digests(path: Path, where: Blocks) -> np.ndarray:
    """Compute the CRC-32 of each block [blocks, L] from the bytes on disk; 0 for a block after the end of the file."""
    out = np.zeros(where.offsets.shape, np.uint32)
    with path.open("rb", buffering=0) as file:
        for flat_index in np.argsort(where.offsets, axis=None):  # in the order on disk
            at = np.unravel_index(flat_index, out.shape)
            file.seek(int(where.offsets[at]))
            out[at] = zlib.crc32(file.read(int(where.sizes[at])))
    return out


def damaged_blocks(path: Path, name: str, element: h5py.Dataset | h5py.Group) -> list[tuple[int, int]]:
    """Return (block, layer) of the blocks of an array whose bytes changed after sealing."""
    stored = np.asarray(dataset_at(group_at(element.file, "digests"), name)[...])
    computed = read_digests(path, blocks(values_of(element)))
    if stored.shape != computed.shape:
        raise KeyError(name)
    return [(int(block), int(layer)) for block, layer in np.argwhere(stored != computed)]


def block_rows(element: h5py.Dataset | h5py.Group) -> int:
    """Return the rows (of a ragged array: tokens) per block of an array."""
    chunks = values_of(element).chunks
    return chunks[0] if chunks else CHUNK_ROWS


def structure_digest(path: Path, file: h5py.File) -> str:
    """Return the SHA-256 over all bytes of a shard except the chunks of its arrays."""
    places = [blocks(values_of(element)) for _, element in arrays_in(file)]
    extents = [(np.concatenate([getattr(p, f).ravel() for p in places])) for f in ("offsets", "sizes")]
    order = np.argsort(extents[0], kind="stable")
    digest, at = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as raw:
        for start, size in zip(extents[0][order].tolist(), extents[1][order].tolist(), strict=True):
            _update(digest, raw, at, start - at)
            at = max(at, start + size)
        _update(digest, raw, at, path.stat().st_size - at)
    return digest.hexdigest()


def _update(digest: Any, raw: FileIO, start: int, size: int) -> None:
    raw.seek(start)
    while size > 0:
        part = raw.read(min(size, _READ))
        if not part:
            return
        digest.update(part)
        size -= len(part)


def stated_digest(element: h5py.Dataset | h5py.Group) -> str:
    """Return the digest of an array that was recorded at sealing."""
    return str(attribute(element, "sha256"))


def layer_major(element: h5py.Dataset | h5py.Group) -> bool:
    """Whether an array is stored as [L, N, D]."""
    return values_of(element).attrs.get("order", "NLD") == "LND"
