"""Which rows are meant, and how they come out of an array of a shard."""

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
from activation_store.format.mapped_file import Source
from activation_store.format.shard import open_shard
from groundscope.core.errors import StoreError

Rows = slice | Sequence[int] | Sequence[bool] | np.ndarray
"""A slice, a boolean mask of all rows, or row numbers in any order (negative ones count from the end)."""


def resolve_rows(rows: Rows | None, n: int, path: Path) -> np.ndarray | range:
    """Return row numbers [m] out of `n`, as a range of step 1 where they are one; `StoreError` where they do not fit."""
    if rows is None:
        return range(n)
    if isinstance(rows, slice):
        found = range(n)[rows]
        return found if found.step == 1 else np.asarray(found, np.int64)
    return as_range(_row_numbers(rows, n, path))


def _row_numbers(rows: Sequence[int] | Sequence[bool] | np.ndarray, n: int, path: Path) -> np.ndarray:
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
        self._asked: set[int] = set()
        if self._by_layer:
            source.in_order()
        self._where = blocks(values) if values.id.get_create_plist().get_nfilters() == 0 else None
        # What a filter takes apart is compared first: a filter is not written for changed bytes either.
        self._packed = (blocks(values), _stored_digests(element, name)) if self._where is None else None
        self._offsets = self._where.offsets if self._where is not None else np.zeros((0, 0), np.int64)
        self._distances: dict[tuple[int, int], tuple[int, int]] = {}
        self.bytes = int(values.id.get_storage_size())
        """What it takes on disk."""
        self.rows = values.shape[1] if self._by_layer else len(values)
        """Examples; of a ragged array tokens."""
        self.offsets = read_offsets(element) if isinstance(element, h5py.Group) else None
        """Where each example begins, int64 [n+1]; None where it is one row each."""
        self.counts = int(attribute(element, "overflow")), int(attribute(element, "nonfinite"))
        """How many values overflowed, and how many came as NaN or infinity."""

    def read_into(self, out: np.ndarray, rows: np.ndarray | range, layer: int, columns: slice) -> None:
        """Write rows [n] (of a ragged array: tokens), in any order and with repeats, into `out` [n, columns].

        As float32, or as they are stored where that is the dtype of `out`. A range, of step 1, is read fastest.
        """
        if not len(rows):
            return
        # bfloat16 is the upper half of a float32: it is widened on its way, and moved up in place.
        widened = self._dtype == "bfloat16" and out.dtype == np.float32
        target = out.view(np.uint32) if widened else out
        if self._where is None:
            with open_shard(self._path, source=self._source) as file:
                values = values_of(element_at(file, f"arrays/{self._name}"))
                self._from_chunks(target, rows, columns, lambda chunk: self._through_filter(values, chunk, layer))
        elif self._by_layer:
            view = self._at(int(self._offsets[0, layer]), self.rows)
            picked = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
            target[:] = view[picked, columns]
        else:
            offsets = self._offsets[:, layer]
            if isinstance(rows, range):
                if layer not in self._asked:
                    self._soon(rows, layer)
                self._from_run(target, rows, layer, columns)
            else:
                self._rows_soon(rows, offsets)
                self._from_chunks(target, rows, columns, lambda chunk: self._at(int(offsets[chunk]), self._step))
        if widened:
            np.left_shift(target, 16, out=target)

    def _from_run(self, out: np.ndarray, rows: range, layer: int, columns: slice) -> None:
        step, at, offsets = self._step, rows.start, self._offsets[:, layer]
        while at < rows.stop:
            chunk, inside = divmod(at, step)
            whole = (rows.stop - at) // step if inside == 0 else 0
            if whole > 1:
                # Chunks at equal distances are one array with a stride: taken with one call, not one for each.
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
            wanted = np.flatnonzero(chunk_of == chunk)
            out[wanted] = chunk_at(chunk)[numbers[wanted] - chunk * self._step, columns]

    def _at(self, offset: int, rows: int) -> np.ndarray:
        dtype = STORAGE[self._dtype]
        return np.ndarray((rows, self._width), dtype, self._source.raw, offset)

    def _even(self, layer: int, chunk: int) -> tuple[int, int]:
        """Return the distance from a chunk to the next, and the last chunk up to which it stays the same."""
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
        # Same rank on both sides: HDF5 is many times slower where the layer axis is dropped while reading.
        block = np.empty((stop - start, 1, self._width), STORAGE[self._dtype])
        values.read_direct(block, np.s_[start:stop, layer : layer + 1])
        return block[:, 0]

    def _soon(self, rows: range, layer: int) -> None:
        # When a layer is first read in long runs, the disk is asked for all of it at once. Later it is in memory, or
        # there is not memory enough.
        where = self._where
        self._asked.add(layer)
        if where is not None:
            for chunk in range(rows.start // where.rows, (rows.stop - 1) // where.rows + 1):
                self._source.soon(int(where.offsets[chunk, layer]), int(where.sizes[chunk, layer]))

    def _rows_soon(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        size = self._width * STORAGE[self._dtype].itemsize
        for start in np.sort(offsets[rows // self._step] + rows % self._step * size).tolist():
            self._source.soon(start, size)


def _stored_digests(element: h5py.Dataset | h5py.Group, name: str) -> np.ndarray:
    return np.asarray(dataset_at(group_at(element.file, "digests"), name)[...])


def token_rows(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the tokens int64 [t] of examples [n] of a ragged array, in their order."""
    starts, lengths = offsets[rows], (offsets[1:] - offsets[:-1])[rows]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + within


def as_range(rows: np.ndarray) -> np.ndarray | range:
    """Return rows as a range where they are neighbours in increasing order."""
    first, n = int(rows[0]) if len(rows) else 0, len(rows)
    if n and int(rows[-1]) == first + n - 1 and (np.diff(rows) == 1).all():
        return range(first, first + n)
    return rows
