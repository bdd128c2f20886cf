"""One shard in the making: chunk by chunk under a temporary name, until it is sealed."""

from __future__ import annotations

import contextlib
import os
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store.background import Background
from activation_store.chunks import array_digest, blocks, structure_digest
from activation_store.columns import write_columns
from activation_store.compression import filter_options
from activation_store.elements import mark
from activation_store.encoding import STORAGE, Encoded, as_column
from activation_store.files import publish_new
from activation_store.layout import (
    CHUNK_ROWS,
    LAYOUT_VERSION,
    STANDARD_COLUMNS,
    ArrayInfo,
    Key,
    Schema,
    canonical_json,
    is_label,
)
from activation_store.manifest import ShardEntry
from activation_store.pen import Pen
from activation_store.shard import open_shard
from concepts.errors import StoreError


class ShardBuilder:
    """Writes one shard: rows are gathered into blocks of 32, each block goes to disk as one chunk a layer.

    What reaches the file depends only on the rows, not on how they were divided into calls, so that a shard written
    by a resumed run has the same bytes. `add` copies what it is given and leaves writing to the background; `seal` is
    a job for the background itself.
    """

    def __init__(self, temporary: Path, schema: Schema, provenance: Mapping[str, Any], disk: Background) -> None:
        self._temporary = temporary
        self._rows = 0
        self._columns: dict[str, list[Any]] = {}
        self._pen = Pen(temporary)
        self._file = h5py.File(self._pen, "w")
        # One that nobody closes is dropped, at the latest before the interpreter ends: HDF5 could not do it after that.
        self._drop = weakref.finalize(self, _discard, self._file, self._pen, temporary, os.getpid())
        start_shard(self._file, schema, provenance)
        self._arrays = {info.key: _ArrayBuilder(self._file, self._pen, info, schema, disk) for info in schema.arrays}

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self._rows

    def add(self, encoded: Mapping[Key, Encoded], table: Mapping[str, Sequence[Any]], rows: slice) -> None:
        """Append some rows of an encoded batch; every batch brings the same columns, the standard ones among them."""
        # Blocks of different arrays fill up, and go to disk, in an order that the rows alone decide: arrays take turns
        # whenever a block of one may be full.
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
        """Hand over what is not yet a full block; nothing can be added after it."""
        for array in self._arrays.values():
            array.flush()

    def seal(self, final: Path) -> ShardEntry:
        """Finish the shard and give it its final name; returns what the manifest says of it."""
        # Further columns are sorted, labels last, so that the order in which a caller names them changes no byte.
        further = sorted(self._columns.keys() - set(STANDARD_COLUMNS), key=lambda name: (is_label(name), name))
        columns = {name: as_column(name, self._columns[name]) for name in (*STANDARD_COLUMNS, *further)}
        digests = {array.info.name: array.finish() for array in self._arrays.values()}
        finish_shard(self._file, columns, self._rows)
        self._file.close()
        self._pen.sync()
        self._pen.close()
        entry = publish_shard(self._temporary, final, digests, tuple(columns["id"]))
        self._drop.detach()
        return entry

    def discard(self) -> None:
        """Drop the shard; never raises."""
        self._drop()


def _discard(file: h5py.File, pen: Pen, temporary: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork: the file is its parent's
    with contextlib.suppress(OSError, RuntimeError):
        file.close()
    pen.close()
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def start_shard(file: h5py.File, schema: Schema, provenance: Mapping[str, Any]) -> None:
    """Write what every shard begins with."""
    mark(file, "activation-shard")
    file.attrs["layout-version"] = LAYOUT_VERSION
    for name, value in (("schema", schema.record()), ("provenance", dict(provenance))):
        mark(file.create_dataset(name, data=canonical_json(value), dtype=h5py.string_dtype()), "json")
    mark(file.create_group("arrays"), "array-groups")
    mark(file.create_group("digests"), "digest-groups")


def finish_shard(file: h5py.File, columns: Mapping[str, np.ndarray], rows: int) -> None:
    """Write what every shard ends with: its table."""
    table = file.create_group("examples")
    mark(table, "example-table")
    write_columns(table, columns)
    file.attrs["rows"] = rows


def publish_shard(temporary: Path, final: Path, arrays: Mapping[str, str], ids: tuple[str, ...]) -> ShardEntry:
    """Give a closed and synced shard its final name; raises `StoreError` where there is one of that name."""
    with open_shard(temporary) as file:
        sha256 = structure_digest(temporary, file)
    size = temporary.stat().st_size
    try:
        publish_new(temporary, final)
    except FileExistsError as error:
        msg = f"{final} is there already: another writer of the same number sealed it; give each its own worker="
        raise StoreError(msg) from error
    return ShardEntry(final.name, size, len(ids), sha256, arrays, ids, LAYOUT_VERSION)


def create_array(
    file: h5py.File, info: ArrayInfo, dtype: str, shape: tuple[int, int, int], **options: Any
) -> tuple[h5py.Group | h5py.Dataset, h5py.Dataset]:
    """Make the element of an array, and the dataset of its values: the same, but where it is ragged."""
    parent, name = site_group(file, "arrays", info)
    if info.ragged:
        group = parent.create_group(name)
        values = group.create_dataset("values", shape=shape, dtype=STORAGE[dtype], **options)
        mark(values, "ragged-values")
        return group, values
    values = parent.create_dataset(name, shape=shape, dtype=STORAGE[dtype], **options)
    return values, values


def site_group(file: h5py.File, kind: str, info: ArrayInfo) -> tuple[h5py.Group, str]:
    """Return the group of an array's site, made where it is missing, and the array's name in it."""
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
    """Give a finished array its attributes, offsets and table of digests; returns its digest."""
    mark(element, "ragged-array" if info.ragged else "activation-array")
    values.attrs["order"] = order
    element.attrs["dtype"] = dtype
    element.attrs["layers"] = np.asarray(info.layers, np.int64)
    element.attrs["n_heads"] = info.n_heads or 0
    element.attrs["overflow"] = overflow
    element.attrs["nonfinite"] = nonfinite
    if offsets is not None and isinstance(element, h5py.Group):
        mark(element.create_dataset("offsets", data=offsets.astype("<i8")), "offsets")
    parent, name = site_group(element.file, "digests", info)
    mark(parent.create_dataset(name, data=digests.astype("<u4")), "chunk-digests")
    element.attrs["sha256"] = digest = array_digest(digests, offsets)
    return digest


class _ArrayBuilder:
    def __init__(self, file: h5py.File, pen: Pen, info: ArrayInfo, schema: Schema, disk: Background) -> None:
        self.info = info
        self._pen = pen
        self._file, self._dtype, self._disk = file, schema.dtype, disk
        self._compressed = filter_options(schema.compression)
        self._free: list[np.ndarray] = []
        self._block = self._fresh()
        self._filled = 0
        self._chunk_rows = 0  # not known before the first block
        self._digests: list[list[int]] = []
        self._lengths: list[int] = []
        self._overflow = 0
        self._nonfinite = 0
        # Of the background alone:
        self._made: tuple[h5py.Group | h5py.Dataset, h5py.Dataset] | None = None

    def add(self, encoded: Encoded, rows: slice) -> None:
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
                self._whole(encoded.stored[at : at + n])
            else:
                self._block[:, self._filled : self._filled + n] = encoded.stored[at : at + n].swapaxes(0, 1)
                self._filled += n
            at += n
            if self._filled == CHUNK_ROWS:
                self.flush()

    def _whole(self, rows: np.ndarray) -> None:
        # What fills a block by itself is digested layer by layer while it is still in the processor's cache.
        block, digests = self._block, []
        for layer, chunk in enumerate(block):
            chunk[:] = rows[:, layer]
            digests.append(zlib.crc32(chunk.data))
        self._chunk_rows = CHUNK_ROWS
        self._hand_over(block, CHUNK_ROWS, digests)

    def flush(self) -> None:
        n, block = self._filled, self._block
        if n == 0:
            return
        # A first block that is not full is the only one: then chunks are clipped to it.
        self._chunk_rows = self._chunk_rows or n
        block[:, n:] = 0  # what pads the last chunk must not depend on what was there before
        digests = [] if self._compressed else [zlib.crc32(chunk[: self._chunk_rows].data) for chunk in block]
        self._hand_over(block, n, digests)

    def _hand_over(self, block: np.ndarray, n: int, digests: list[int]) -> None:
        self._digests.append(digests)
        self._disk.submit(lambda: self._write(block, n), block.nbytes)
        self._block, self._filled = self._fresh(), 0

    def finish(self) -> str:
        element, values = self._made if self._made else self._create(1)
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

    def _fresh(self) -> np.ndarray:
        # A block that was written is filled again: memory that is new must first be had from the system, page by page.
        if self._free:
            return self._free.pop()
        return np.zeros((self.info.n_layers, CHUNK_ROWS, self.info.width), STORAGE[self._dtype])  # [L, 32, D]

    def _create(self, chunk_rows: int) -> tuple[h5py.Group | h5py.Dataset, h5py.Dataset]:
        n_layers, width = self.info.n_layers, self.info.width
        self._made = create_array(
            self._file,
            self.info,
            self._dtype,
            (0, n_layers, width),
            maxshape=(None, n_layers, width),
            chunks=(chunk_rows, 1, width),
            **self._compressed,
        )
        return self._made

    def _write(self, block: np.ndarray, n: int) -> None:
        values = (self._made if self._made else self._create(self._chunk_rows))[1]
        start = len(values)
        values.resize(start + n, axis=0)
        for layer, chunk in enumerate(block):
            if self._compressed:
                values[start : start + n, layer : layer + 1] = chunk[:n, None]
            else:
                # Handing HDF5 the finished chunk skips its copying and runs at the speed of the disk.
                values.id.write_direct_chunk((start, layer, 0), chunk[: self._chunk_rows])
        self._pen.check()
        self._free.append(block)

    def _stored_digests(self, values: h5py.Dataset) -> np.ndarray:
        # Only HDF5 knows what the filter made of a chunk, once it has let go of it.
        values.file.flush()
        where = blocks(values)
        stored = (
            values.id.read_direct_chunk((block * where.rows, layer, 0))[1]
            for block, layer in np.ndindex(where.offsets.shape)
        )
        return np.array([zlib.crc32(chunk) for chunk in stored], np.uint32).reshape(where.offsets.shape)
