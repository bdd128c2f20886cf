"""Which rows are meant, and how they come out of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from activation_store.layout import CHUNK_ROWS
from concepts.errors import StoreError

Rows = slice | Sequence[int] | Sequence[bool] | np.ndarray
"""A slice, a boolean mask of all rows, or row numbers in any order (negative ones count from the end)."""


def resolve_rows(rows: Rows | None, n: int, path: Path) -> np.ndarray:
    """Return row numbers int64 [m] out of `n`; raises `StoreError` where they do not fit."""
    if rows is None:
        return np.arange(n)
    if isinstance(rows, slice):
        return np.arange(n)[rows]
    given = np.asarray(rows)
    if given.ndim == 1 and given.dtype == bool and len(given) == n:
        return np.flatnonzero(given)
    if given.ndim == 1 and (given.dtype.kind in "iu" or given.size == 0) and given.dtype != bool:
        numbers = given.astype(np.int64)
        outside = numbers[(numbers < -n) | (numbers >= n)]
        if not outside.size:
            return np.where(numbers < 0, numbers + n, numbers)
        there = f"it has {n}, numbered 0 to {n - 1}" if n else "it has none"
        msg = f"{path}: example {outside[0]} not in store: {there}"
        raise StoreError(msg)
    msg = (
        f"{path}: examples of dtype {given.dtype} and shape {list(given.shape)} select nothing; "
        f"give a slice, a boolean mask of length {n}, or an array of row numbers"
    )
    raise StoreError(msg)


def gather(dataset: h5py.Dataset, rows: np.ndarray, layer: int, columns: slice, dtype: np.dtype) -> np.ndarray:
    """Read rows [n] of one layer, in any order and with repeats, as stored values [n, columns]."""
    step = dataset.chunks[0] if dataset.chunks else CHUNK_ROWS
    width = columns.stop - columns.start
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return _block(dataset, int(rows[0]), int(rows[-1]) + 1, layer, columns, dtype)
    # HDF5's own selection of scattered rows is slow: read every chunk that is touched once, and pick from it.
    out = np.empty((len(rows), width), dtype)
    chunk_of = rows // step
    for chunk in np.unique(chunk_of):
        wanted = np.flatnonzero(chunk_of == chunk)
        start = int(chunk) * step
        block = _block(dataset, start, min(start + step, len(dataset)), layer, columns, dtype)
        out[wanted] = block[rows[wanted] - start]
    return out


def _block(dataset: h5py.Dataset, start: int, stop: int, layer: int, columns: slice, dtype: np.dtype) -> np.ndarray:
    # Same rank on both sides: HDF5 is many times slower where the layer axis is dropped while reading.
    block = np.empty((stop - start, 1, columns.stop - columns.start), dtype)
    dataset.read_direct(block, np.s_[start:stop, layer : layer + 1, columns])
    return block[:, 0]
