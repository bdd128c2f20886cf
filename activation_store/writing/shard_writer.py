"""One shard in the making: chunk by chunk under a temporary name, until it is sealed."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from activation_store.format.buffered_file import Pen
from activation_store.format.encoding import Encoded, as_column
from activation_store.format.manifest import ShardEntry
from activation_store.format.schema import CHUNK_ROWS, STANDARD_COLUMNS, Key, Schema, is_label
from activation_store.writing.array_writer import ArrayBuilder
from activation_store.writing.queue import Background, Pool
from activation_store.writing.shard_parts import finish_shard, publish_shard, start_shard


class ShardBuilder:
    """Writes one shard: rows are gathered into blocks of 32, each block goes to disk as one chunk a layer.

    What reaches the file depends only on the rows, not on how they were divided into calls, so that a shard written
    by a resumed run has the same bytes. `add` copies what it is given and leaves writing to the background; `finish` is
    a job for the background itself, `publish` one that waits for the disk and needs nothing that the next shard uses.
    """

    def __init__(
        self, temporary: Path, schema: Schema, provenance: Mapping[str, Any], disk: Background, pool: Pool
    ) -> None:
        self._temporary = temporary
        self._rows = 0
        self._columns: dict[str, list[Any]] = {}
        self._pen = Pen(temporary)
        self._file = h5py.File(self._pen, "w")
        # One that nobody closes is dropped, at the latest before the interpreter ends: HDF5 could not do it after that.
        self._drop = weakref.finalize(self, _discard, self._file, self._pen, temporary, os.getpid())
        start_shard(self._file, schema, provenance)
        self._arrays = {i.key: ArrayBuilder(self._file, self._pen, i, schema, disk, pool) for i in schema.arrays}
        self._digests: dict[str, str] = {}
        self._ids: tuple[str, ...] = ()

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

    def finish(self) -> None:
        """Write what a shard ends with, and have HDF5 let go of it."""
        # Further columns are sorted, labels last, so that the order in which a caller names them changes no byte.
        further = sorted(self._columns.keys() - set(STANDARD_COLUMNS), key=lambda name: (is_label(name), name))
        columns = {name: as_column(name, self._columns[name]) for name in (*STANDARD_COLUMNS, *further)}
        self._digests = {array.info.name: array.finish() for array in self._arrays.values()}
        self._ids = tuple(columns["id"])
        finish_shard(self._file, columns, self._rows)
        self._file.close()

    def publish(self, final: Path, announce: Callable[[ShardEntry], None]) -> ShardEntry:
        """Bring the finished shard to the disk and give it its final name; see `publish_shard`."""
        self._pen.check()
        self._pen.close()
        entry = publish_shard(self._temporary, final, self._digests, self._ids, announce)
        self._drop.detach()
        return entry

    def discard(self) -> None:
        """Drop the shard; never raises."""
        self._drop()


def _discard(file: h5py.File, pen: Pen, temporary: Path, owner: int) -> None:
    # In the child of a fork HDF5 lets go of the file as well, or it would at the end of the interpreter; the pen writes
    # nothing there, as the file is its parent's.
    with contextlib.suppress(OSError, RuntimeError):
        file.close()
    pen.close()
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
