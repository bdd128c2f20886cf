"""Resolve row selections, and read rows from the arrays of a shard."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np

from activation_store.format.columns import read_offsets
from activation_store.format.digests import blocks, layer_major, values_of
from activation_store.format.encoding import STORAGE
from activation_store.format.hdf5 import attribute, dataset_at, element_at, group_at
from activation_store.format.mapped_file import MappedFile
from activation_store.format.shard import open_shard
from groundscope.core.errors import StoreError

RowSelection = slice | Sequence[int] | Sequence[bool] | np.ndarray
"""A slice, a boolean mask of all rows, or row numbers in any order (negative ones count from the end)."""


def resolve_rows(rows: RowSelection | None, n: int, path: Path) -> np.ndarray | range:
    """Return row numbers [m] out of `n`, as a range if they are contiguous; raise `StoreError` if they do not fit."""
    if rows is None:
        return range(n)
    if isinstance(rows, slice):
        selected = range(n)[rows]
        return selected if selected.step == 1 else np.asarray(selected, np.int64)
    return as_range(_row_numbers(rows, n, path))


def _row_numbers(rows: Sequence[int] | Sequence[bool] | np.ndarray, n: int, path: Path) -> np.ndarray:
    requested = np.asarray(rows)
    if requested.ndim == 1 and requested.dtype == bool and len(requested) == n:
        return np.flatnonzero(requested)
    if requested.ndim == 1 and (requested.dtype.kind in "iu" or requested.size == 0) and requested.dtype != bool:
        numbers = requested.astype(np.int64)
        outside = numbers[(numbers < -n) | (numbers >= n)]
        if not outside.size:
            return np.where(numbers < 0, numbers + n, numbers)
        allowed = f"it has {n}, numbered 0 to {n - 1}" if n else "it has none"
        msg = f"{path}: example {outside[0]} not in store: {allowed}"
        raise StoreError(msg)
    msg = (
        f"{path}: examples of dtype {requested.dtype} and shape {list(requested.shape)} select nothing; "
        f"give a slice, a boolean mask of length {n}, or an array of row numbers"
    )
    raise StoreError(msg)


class ArrayReader:
    """Reads rows of one layer of an array, directly from their positions in the file if the array is not compressed.

    A read through HDF5 costs a search per chunk and, for scattered rows, much more. The positions of all chunks are
    queried once, and no HDF5 object stays open.
    """

    def __init__(
        self, path: Path, name: str, element: h5py.Dataset | h5py.Group, source: MappedFile, dtype: str
    ) -> None:
        values = values_of(element)
        self._path, self._name, self._source = path, name, source
        self._dtype = dtype
        self._width = values.shape[2]
        self._step = (values.chunks or (1,))[0]
        self._by_layer = layer_major(element)
        self._prefetched: set[int] = set()
        if self._by_layer:
            source.allow_readahead()
        self._where = blocks(values) if values.id.get_create_plist().get_nfilters() == 0 else None
        # Compressed chunks are verified before decompression: filters are not robust against changed bytes.
        self._packed = (blocks(values), _stored_digests(element, name)) if self._where is None else None
        self._offsets = self._where.offsets if self._where is not None else np.zeros((0, 0), np.int64)
        self._distances: dict[tuple[int, int], tuple[int, int]] = {}
        self.bytes = int(values.id.get_storage_size())
        """Bytes on disk."""
        self.rows = values.shape[1] if self._by_layer else len(values)
        """Number of examples; of a ragged array, of tokens."""
        self.offsets = read_offsets(element) if isinstance(element, h5py.Group) else None
        """Start of each example, int64 [n+1]; None with one row per example."""
        self.counts = int(attribute(element, "overflow")), int(attribute(element, "nonfinite"))
        """Number of values that overflowed, and of values that were NaN or infinite."""

    def read_into(self, out: np.ndarray, rows: np.ndarray | range, layer: int, columns: slice) -> None:
        """Read rows [n] (of a ragged array: tokens), in any order and with repeats, into `out` [n, columns].

        Values are converted to float32, or copied unchanged if `out` has the storage dtype. A range of step 1 is fastest.
        """
        if not len(rows):
            return
        # bfloat16 is the upper half of a float32: copy it into wider integers, then shift in place.
        widened = self._dtype == "bfloat16" and out.dtype == np.float32
        target = out.view(np.uint32) if widened else out
        if self._where is None:
            with open_shard(self._path, source=self._source) as file:
                values = values_of(element_at(file, f"arrays/{self._name}"))
                self._from_chunks(target, rows, columns, lambda chunk: self._through_filter(values, chunk, layer))
        elif self._by_layer:
            view = self._at(int(self._offsets[0, layer]), self.rows)
            selected = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
            target[:] = view[selected, columns]
        else:
            offsets = self._offsets[:, layer]
            if isinstance(rows, range):
                if layer not in self._prefetched:
                    self._prefetch(rows, layer)
                self._from_run(target, rows, layer, columns)
            else:
                self._prefetch_rows(rows, offsets)
                self._from_chunks(target, rows, columns, lambda chunk: self._at(int(offsets[chunk]), self._step))
        if widened:
            np.left_shift(target, 16, out=target)

    def _from_run(self, out: np.ndarray, rows: range, layer: int, columns: slice) -> None:
        step, at, offsets = self._step, rows.start, self._offsets[:, layer]
        while at < rows.stop:
            chunk, inside = divmod(at, step)
            whole = (rows.stop - at) // step if inside == 0 else 0
            if whole > 1:
                # Equally spaced chunks form one strided array: one copy instead of one per chunk.
                jump, last = self._even(layer, chunk)
                count = min(whole, last + 1 - chunk)
                n = count * step
                part = self._spaced(int(offsets[chunk]), jump, count)[:, :, columns]
                out[at - rows.start : at - rows.start + n].reshape(count, step, -1)[:] = part
            else:
                n = min(step - inside, rows.stop - at)
                part = self._at(int(offsets[chunk]), step)[inside : inside + n, columns]
                out[at - rows.start : at - rows.start + n] = part
            at += n

    def _from_chunks(
        self, out: np.ndarray, rows: np.ndarray | range, columns: slice, chunk_at: Callable[[int], np.ndarray]
    ) -> None:
        numbers = np.asarray(rows)
        chunk_of = numbers // self._step
        for chunk in np.unique(chunk_of).tolist():
            here = np.flatnonzero(chunk_of == chunk)
            out[here] = chunk_at(chunk)[numbers[here] - chunk * self._step, columns]

    def _at(self, offset: int, rows: int) -> np.ndarray:
        dtype = STORAGE[self._dtype]
        return np.ndarray((rows, self._width), dtype, self._source.raw, offset)

    def _even(self, layer: int, chunk: int) -> tuple[int, int]:
        """Return the distance from a chunk to the next, and the last chunk up to which this distance is constant."""
        key = (layer, chunk)
        if key not in self._distances:
            jumps = np.diff(self._offsets[chunk:, layer])
            self._distances[key] = int(jumps[0]), chunk + (int(np.argmax(jumps != jumps[0])) or len(jumps))
        return self._distances[key]

    def _spaced(self, offset: int, jump: int, count: int) -> np.ndarray:
        dtype = STORAGE[self._dtype]
        strides = (jump, self._width * dtype.itemsize, dtype.itemsize)
        return np.ndarray((count, self._step, self._width), dtype, self._source.raw, offset, strides)

    def _through_filter(self, values: h5py.Dataset, chunk: int, layer: int) -> np.ndarray:
        if self._packed is not None:
            where, digests = self._packed
            at, size = int(where.offsets[chunk, layer]), int(where.sizes[chunk, layer])
            if zlib.crc32(self._source.raw[at : at + size]) != digests[chunk, layer]:
                msg = f"block {chunk} of layer number {layer} of {self._name} has changed bytes"
                raise ValueError(msg)
        start, stop = chunk * self._step, min((chunk + 1) * self._step, len(values))
        # Same rank on both sides: HDF5 is many times slower if the read drops the layer axis.
        block = np.empty((stop - start, 1, self._width), STORAGE[self._dtype])
        values.read_direct(block, np.s_[start:stop, layer : layer + 1])
        return block[:, 0]

    def _prefetch(self, rows: range, layer: int) -> None:
        # Prefetch the whole range on the first contiguous read of a layer. Later the data is in memory, or does not
        # fit into memory.
        where = self._where
        self._prefetched.add(layer)
        if where is not None:
            for chunk in range(rows.start // where.rows, (rows.stop - 1) // where.rows + 1):
                self._source.prefetch(int(where.offsets[chunk, layer]), int(where.sizes[chunk, layer]))

    def _prefetch_rows(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        size = self._width * STORAGE[self._dtype].itemsize
        for start in np.sort(offsets[rows // self._step] + rows % self._step * size).tolist():
            self._source.prefetch(start, size)


def _stored_digests(element: h5py.Dataset | h5py.Group, name: str) -> np.ndarray:
    return np.asarray(dataset_at(group_at(element.file, "digests"), name)[...])


def token_rows(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the rows int64 [t] of a ragged array that hold the tokens of examples `rows` [n], in their order."""
    starts, lengths = offsets[rows], (offsets[1:] - offsets[:-1])[rows]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + within


def as_range(rows: np.ndarray) -> np.ndarray | range:
    """Return rows as a range if they are consecutive and increasing."""
    first, n = int(rows[0]) if len(rows) else 0, len(rows)
    if n and int(rows[-1]) == first + n - 1 and (np.diff(rows) == 1).all():
        return range(first, first + n)
    return rows
