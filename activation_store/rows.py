"""Which rows are meant, and how they come out of an array of a shard."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np

from activation_store.chunks import blocks, layer_major, values_of
from activation_store.columns import read_offsets
from activation_store.elements import attribute, element_at
from activation_store.encoding import STORAGE
from activation_store.shard import open_shard
from activation_store.source import Source
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


class ArrayReader:
    """Takes rows of one layer out of an array: straight from where they are in the file, if they are not compressed.

    HDF5's own way costs a search for each chunk and, for scattered rows, much more; the places of all chunks are asked of
    it once, and nothing of it is kept open.
    """

    def __init__(self, path: Path, name: str, element: h5py.Dataset | h5py.Group, source: Source, dtype: str) -> None:
        values = values_of(element)
        self._path, self._name, self._source = path, name, source
        self._dtype = dtype
        self._width = values.shape[2]
        self._step = (values.chunks or (1,))[0]
        self._by_layer = layer_major(element)
        self._where = blocks(values) if values.id.get_create_plist().get_nfilters() == 0 else None
        self.bytes = int(values.id.get_storage_size())
        """What it takes on disk."""
        self.rows = values.shape[1] if self._by_layer else len(values)
        """Examples; of a ragged array tokens."""
        self.offsets = read_offsets(element) if isinstance(element, h5py.Group) else None
        """Where each example begins, int64 [n+1]; None where it is one row each."""
        self.counts = int(attribute(element, "overflow")), int(attribute(element, "nonfinite"))
        """How many values overflowed, and how many came as NaN or infinity."""

    def read_into(self, out: np.ndarray, rows: np.ndarray, layer: int, columns: slice) -> None:
        """Write rows int64 [n] (of a ragged array: tokens), in any order and with repeats, into `out` [n, columns].

        As float32, or as they are stored where that is the dtype of `out`.
        """
        # bfloat16 is the upper half of a float32: it is widened on its way, and moved up in place.
        widened = self._dtype == "bfloat16" and out.dtype == np.float32
        target = out.view(np.uint32) if widened else out
        if len(rows) and self._where is None:
            with open_shard(self._path, source=self._source) as file:
                values = values_of(element_at(file, f"arrays/{self._name}"))
                self._from_chunks(target, rows, columns, lambda chunk: self._through_filter(values, chunk, layer))
        elif len(rows) and self._where is not None:
            places = self._where.offsets[:, layer], self._where.sizes[:, layer]
            if self._by_layer:
                self._from_layer(target, rows, columns, int(places[0][0]))
            else:
                if _is_run(rows):
                    for chunk in range(rows[0] // self._step, rows[-1] // self._step + 1):
                        self._soon(int(places[0][chunk]), int(places[1][chunk]))
                self._from_chunks(target, rows, columns, lambda chunk: self._at(int(places[0][chunk]), self._step))
        if widened:
            np.left_shift(target, 16, out=target)

    def _from_layer(self, out: np.ndarray, rows: np.ndarray, columns: slice, start: int) -> None:
        view = self._at(start, self.rows)
        if _is_run(rows):
            first, run, size = int(rows[0]), len(rows), self._width * view.itemsize
            self._soon(start + first * size, run * size)
            out[:] = view[first : first + run, columns]
        else:
            out[:] = view[rows, columns]

    def _from_chunks(
        self, out: np.ndarray, rows: np.ndarray, columns: slice, chunk_at: Callable[[int], np.ndarray]
    ) -> None:
        step, chunk_of = self._step, rows // self._step
        run = _is_run(rows)
        for chunk in np.unique(chunk_of).tolist():
            start, block = chunk * step, chunk_at(chunk)  # [<= 32, D]
            if run:
                first, last = max(start, int(rows[0])), min(start + step, int(rows[-1]) + 1)
                out[first - rows[0] : last - rows[0]] = block[first - start : last - start, columns]
            else:
                wanted = np.flatnonzero(chunk_of == chunk)
                out[wanted] = block[rows[wanted] - start, columns]

    def _at(self, offset: int, rows: int) -> np.ndarray:
        dtype = STORAGE[self._dtype]
        return np.frombuffer(self._source.raw, dtype, rows * self._width, offset).reshape(rows, self._width)

    def _through_filter(self, values: h5py.Dataset, chunk: int, layer: int) -> np.ndarray:
        start, stop = chunk * self._step, min((chunk + 1) * self._step, len(values))
        # Same rank on both sides: HDF5 is many times slower where the layer axis is dropped while reading.
        block = np.empty((stop - start, 1, self._width), STORAGE[self._dtype])
        values.read_direct(block, np.s_[start:stop, layer : layer + 1])
        return block[:, 0]

    def _soon(self, start: int, size: int) -> None:
        # So that the disk is asked for all of it at once, and not page by page as each is touched.
        page = start - start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):
            self._source.raw.madvise(mmap.MADV_WILLNEED, page, min(start + size, len(self._source.raw)) - page)


def token_rows(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the tokens int64 [t] of examples [n] of a ragged array, in their order."""
    starts, lengths = offsets[rows], (offsets[1:] - offsets[:-1])[rows]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + within


def _is_run(rows: np.ndarray) -> bool:
    return bool(np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))))
