"""Write one shard chunk by chunk under a temporary name, and seal it."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from activation_store.format.buffered_file import BufferedFile
from activation_store.format.encoding import Encoded, as_column
from activation_store.format.manifest import ShardEntry
from activation_store.format.schema import CHUNK_ROWS, STANDARD_COLUMNS, Key, Schema, is_label
from activation_store.writing.array_writer import ArrayBuilder
from activation_store.writing.queue import Background, Pool
from activation_store.writing.shard_parts import finish_shard, publish_shard, start_shard


class ShardBuilder:
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
        self._file = h5py.File(self._raw_file, "w")
        # An unclosed shard is discarded, at the latest before the interpreter exits: HDF5 could not close it afterwards.
        self._finalizer = weakref.finalize(self, _discard, self._file, self._raw_file, temporary, os.getpid())
        start_shard(self._file, schema, provenance)
        self._arrays = {i.key: ArrayBuilder(self._file, self._raw_file, i, schema, disk, pool) for i in schema.arrays}
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
