"""Write a shard block by block under a temporary name, with a digest per chunk, and seal it under its final name."""

from __future__ import annotations

import contextlib
import os
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store.format.buffered_file import BufferedFile, open_hdf5
from activation_store.format.columns import write_columns
from activation_store.format.compression import filter_options
from activation_store.format.digests import array_digest, arrays_in, blocks, values_of
from activation_store.format.encoding import STORAGE, Encoded, as_column
from activation_store.format.hdf5 import dataset_at, group_at, mark
from activation_store.format.manifest import ShardEntry
from activation_store.format.mapped_file import MappedFile
from activation_store.format.schema import (
    CHUNK_ROWS,
    STANDARD_COLUMNS,
    ArrayInfo,
    Key,
    Schema,
    is_label,
)
from activation_store.format.seal import block_table, write_seal
from activation_store.format.shard import version_of
from activation_store.writing.queue import Background, Pool
from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json, publish_new


class ShardWriter:
    """Writes one shard: rows are collected into blocks of 32; each block is written as one chunk per layer.

    The bytes of the file depend only on the rows, not on their division into calls, so that a shard written by a resumed
    run has the same bytes. `add` copies its arguments and submits the writes to the background thread; `finish` runs in
    that thread; `publish` waits for the disk and shares no state with the next shard.
    """

    def __init__(
        self, temporary: Path, schema: Schema, provenance: Mapping[str, Any], disk: Background, pool: Pool
    ) -> None:
        self._temporary = temporary
        self._rows = 0
        self._columns: dict[str, list[Any]] = {}
        self._raw_file = BufferedFile(temporary)
        self._file = open_hdf5(self._raw_file, "w")
        # An unclosed shard is discarded, at the latest before the interpreter exits: HDF5 could not close it afterwards.
        self._finalizer = weakref.finalize(self, _discard, self._file, self._raw_file, temporary, os.getpid())
        start_shard(self._file, schema, provenance)
        self._arrays = {i.key: ArrayWriter(self._file, self._raw_file, i, schema, disk, pool) for i in schema.arrays}
        self._digests: dict[str, str] = {}
        self._ids: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._rows

    def add(self, encoded: Mapping[Key, Encoded], table: Mapping[str, Sequence[Any]], rows: slice) -> None:
        """Append rows of an encoded batch; every batch must have the same columns, including the standard ones."""
        # The order in which blocks of different arrays are written must depend only on the rows: arrays alternate
        # whenever a block of one can be full.
        step = 1 if any(array.info.ragged for array in self._arrays.values()) else CHUNK_ROWS
        at, done = rows.start, self._rows
        while at < rows.stop:
            n = min(rows.stop - at, step - done % step)
            for key, array in self._arrays.items():
                array.add(encoded[key], slice(at, at + n))
            at, done = at + n, done + n
        for name, values in table.items():
            self._columns.setdefault(name, []).extend(values[rows])
        self._rows += rows.stop - rows.start

    def flush(self) -> None:
        """Submit all incomplete blocks; no rows can be added afterwards."""
        for array in self._arrays.values():
            array.flush()

    def finish(self) -> None:
        """Write the example table and close the HDF5 file."""
        # Additional columns are sorted, labels last, so that their order in the caller's table changes no byte.
        further = sorted(self._columns.keys() - set(STANDARD_COLUMNS), key=lambda name: (is_label(name), name))
        columns = {name: as_column(name, self._columns[name]) for name in (*STANDARD_COLUMNS, *further)}
        self._digests = {array.info.name: array.finish() for array in self._arrays.values()}
        self._ids = tuple(columns["id"])
        finish_shard(self._file, columns, self._rows)
        self._file.close()

    def publish(self, final: Path, announce: Callable[[ShardEntry], None]) -> ShardEntry:
        """Sync the finished shard and rename it to its final name; see `publish_shard`."""
        self._raw_file.check()
        self._raw_file.close()
        entry = publish_shard(self._temporary, final, self._digests, self._ids, announce)
        self._finalizer.detach()
        return entry

    def discard(self) -> None:
        """Discard the shard; never raise."""
        self._finalizer()


def _discard(file: h5py.File, raw_file: BufferedFile, temporary: Path, owner: int) -> None:
    # A forked child also closes the file, or HDF5 would close it when the interpreter exits; `raw_file` writes nothing
    # there, because the file belongs to the parent.
    with contextlib.suppress(OSError, RuntimeError):
        file.close()
    raw_file.close()
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class ArrayWriter:
    """Collects the rows of one array into blocks of 32, and submits each to the background thread as one chunk per layer."""

    def __init__(
        self, file: h5py.File, raw_file: BufferedFile, info: ArrayInfo, schema: Schema, disk: Background, pool: Pool
    ) -> None:
        self.info = info
        self._raw_file = raw_file
        self._file, self._dtype, self._disk = file, schema.storage(info), disk
        self._compressed = filter_options(schema.compression)
        self._pool = pool
        self._block = self._new_block()
        self._filled = 0
        self._chunk_rows = 0  # set by the first block
        self._digests: list[list[int]] = []
        self._lengths: list[int] = []
        self._overflow = 0
        self._nonfinite = 0
        # Used only by the background thread:
        self._element: tuple[h5py.Group | h5py.Dataset, h5py.Dataset] | None = None

    def add(self, encoded: Encoded, rows: slice) -> None:
        """Append a slice of the examples of an encoded batch."""
        self._overflow += int(encoded.overflow[rows].sum())
        self._nonfinite += int(encoded.nonfinite[rows].sum())
        at, stop = rows.start, rows.stop
        if encoded.offsets is not None:
            offsets = encoded.offsets[at : stop + 1]
            self._lengths.extend(np.diff(offsets).tolist())
            at, stop = int(offsets[0]), int(offsets[-1])
        while at < stop:
            n = min(stop - at, CHUNK_ROWS - self._filled)
            if n == CHUNK_ROWS and not self._compressed:
                self._add_block(encoded.stored[at : at + n])
            else:
                self._block[:, self._filled : self._filled + n] = encoded.stored[at : at + n].swapaxes(0, 1)
                self._filled += n
            at += n
            if self._filled == CHUNK_ROWS:
                self.flush()

    def _add_block(self, rows: np.ndarray) -> None:
        # Rows that fill a whole block are digested layer by layer while they are in the processor's cache.
        block, digests = self._block, []
        for layer, chunk in enumerate(block):
            chunk[:] = rows[:, layer]
            digests.append(zlib.crc32(chunk.data))
        self._chunk_rows = CHUNK_ROWS
        self._submit(block, CHUNK_ROWS, digests)

    def flush(self) -> None:
        """Submit the last block, even if it is not full."""
        n, block = self._filled, self._block
        if n == 0:
            return
        # A first block that is not full is the only block: chunks are then clipped to it.
        self._chunk_rows = self._chunk_rows or n
        block[:, n:] = 0  # the padding of the last chunk must not depend on the block's earlier contents
        digests = [] if self._compressed else [zlib.crc32(chunk[: self._chunk_rows].data) for chunk in block]
        self._submit(block, n, digests)

    def _submit(self, block: np.ndarray, n: int, digests: list[int]) -> None:
        self._digests.append(digests)
        self._disk.submit(lambda: self._write(block, n), block.nbytes)
        self._block, self._filled = self._new_block(), 0

    def finish(self) -> str:
        """Write the array's attributes after all its values are on disk; return its digest."""
        element, values = self._element if self._element else self._create(1)
        if self._compressed:
            digests = self._stored_digests(values)
        else:
            digests = np.array(self._digests, np.uint32).reshape(-1, self.info.n_layers)
        return describe_array(
            element,
            values,
            self.info,
            self._dtype,
            digests,
            offsets=np.cumsum([0, *self._lengths], dtype=np.int64) if self.info.ragged else None,
            overflow=self._overflow,
            nonfinite=self._nonfinite,
        )

    def _new_block(self) -> np.ndarray:
        return self._pool.take((self.info.n_layers, CHUNK_ROWS, self.info.width), STORAGE[self._dtype])  # [L, 32, D]

    def _create(self, chunk_rows: int) -> tuple[h5py.Group | h5py.Dataset, h5py.Dataset]:
        n_layers, width = self.info.n_layers, self.info.width
        self._element = create_array(
            self._file,
            self.info,
            self._dtype,
            (0, n_layers, width),
            maxshape=(None, n_layers, width),
            chunks=(chunk_rows, 1, width),
            **self._compressed,
        )
        return self._element

    def _write(self, block: np.ndarray, n: int) -> None:
        values = (self._element if self._element else self._create(self._chunk_rows))[1]
        start = len(values)
        values.resize(start + n, axis=0)
        for layer, chunk in enumerate(block):
            if self._compressed:
                values[start : start + n, layer : layer + 1] = chunk[:n, None]
            else:
                # Writing the finished chunk directly avoids a copy in HDF5 and runs at the speed of the disk.
                values.id.write_direct_chunk((start, layer, 0), chunk[: self._chunk_rows])
        self._raw_file.check()
        self._pool.release(block)

    def _stored_digests(self, values: h5py.Dataset) -> np.ndarray:
        # The compressed bytes of a chunk are available only from HDF5, after a flush.
        values.file.flush()
        where = blocks(values)
        stored = (
            values.id.read_direct_chunk((block * where.rows, layer, 0))[1]
            for block, layer in np.ndindex(where.offsets.shape)
        )
        return np.array([zlib.crc32(chunk) for chunk in stored], np.uint32).reshape(where.offsets.shape)


def start_shard(file: h5py.File, schema: Schema, provenance: Mapping[str, Any]) -> None:
    """Write the first elements of a shard: schema, provenance and groups."""
    mark(file, "activation-shard")
    file.attrs["layout-version"] = schema.layout_version
    for name, value in (("schema", schema.record()), ("provenance", dict(provenance))):
        mark(file.create_dataset(name, data=canonical_json(value), dtype=h5py.string_dtype()), "json")
    mark(file.create_group("arrays"), "array-groups")
    mark(file.create_group("digests"), "digest-groups")


def finish_shard(file: h5py.File, columns: Mapping[str, np.ndarray], rows: int) -> None:
    """Write the last element of a shard: the example table."""
    table = file.create_group("examples")
    mark(table, "example-table")
    write_columns(table, columns)
    file.attrs["rows"] = rows


def publish_shard(
    temporary: Path,
    final: Path,
    arrays: Mapping[str, str],
    ids: tuple[str, ...],
    announce: Callable[[ShardEntry], None] | None = None,
) -> ShardEntry:
    """Seal a closed shard, sync it and rename it to its final name; return its manifest entry.

    `announce` is called before the rename, so that the digest is recorded before the final name exists. Raise `StoreError`
    if a file with that name exists.
    """
    with contextlib.closing(open_hdf5(MappedFile(temporary), "r")) as file:
        tables, layout_version = [], version_of(file)
        for name, element in arrays_in(file):
            where, digests = blocks(values_of(element)), dataset_at(group_at(file, "digests"), name)[...]
            tables.append(np.stack([where.offsets, where.sizes, digests.astype(np.int64)]).reshape(3, -1))
    sha256 = write_seal(temporary, block_table(*np.concatenate(tables, axis=1)), rows=len(ids))
    entry = ShardEntry(final.name, temporary.stat().st_size, len(ids), sha256, arrays, ids, layout_version)
    if announce is not None:
        announce(entry)
    try:
        publish_new(temporary, final)
    except FileExistsError as error:
        msg = f"{final} already exists: another writer with the same worker number sealed it; give each its own worker="
        raise StoreError(msg) from error
    return entry


def create_array(
    file: h5py.File, info: ArrayInfo, dtype: str, shape: tuple[int, int, int], **options: Any
) -> tuple[h5py.Group | h5py.Dataset, h5py.Dataset]:
    """Create the element of an array and the dataset of its values: the same object, unless the array is ragged."""
    parent, name = site_group(file, "arrays", info)
    if info.ragged:
        group = parent.create_group(name)
        values = group.create_dataset("values", shape=shape, dtype=STORAGE[dtype], **options)
        mark(values, "ragged-values")
        return group, values
    values = parent.create_dataset(name, shape=shape, dtype=STORAGE[dtype], **options)
    return values, values


def site_group(file: h5py.File, kind: str, info: ArrayInfo) -> tuple[h5py.Group, str]:
    """Return the group of an array's site, created if missing, and the array's name in it."""
    site, name = info.name.split("/")
    group = file.require_group(f"{kind}/{site}")
    if "encoding-type" not in group.attrs:
        mark(group, "site-group")
    return group, name


def describe_array(
    element: h5py.Group | h5py.Dataset,
    values: h5py.Dataset,
    info: ArrayInfo,
    dtype: str,
    digests: np.ndarray,
    *,
    offsets: np.ndarray | None = None,
    overflow: int = 0,
    nonfinite: int = 0,
    order: str = "NLD",
) -> str:
    """Write the attributes, offsets and table of digests of a finished array; return its digest."""
    mark(element, "ragged-array" if info.ragged else "activation-array")
    values.attrs["order"] = order
    element.attrs["dtype"] = dtype
    element.attrs["layers"] = np.asarray(info.layers, np.int64)
    element.attrs["n_heads"] = info.n_heads or 0
    if info.heads:
        element.attrs["heads"] = np.asarray(info.heads, np.int64)
    element.attrs["overflow"] = overflow
    element.attrs["nonfinite"] = nonfinite
    if offsets is not None and isinstance(element, h5py.Group):
        mark(element.create_dataset("offsets", data=offsets.astype("<i8")), "offsets")
    parent, name = site_group(element.file, "digests", info)
    mark(parent.create_dataset(name, data=digests.astype("<u4")), "chunk-digests")
    element.attrs["sha256"] = digest = array_digest(digests, offsets)
    return digest
