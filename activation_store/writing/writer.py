"""Write a store: one stream of sealed shards per worker, resumed exactly after the last sealed shard."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from activation_store.format.buffered_file import hold_hdf5_while_forking
from activation_store.format.columns import columns_in, read_column
from activation_store.format.compression import require_filter
from activation_store.format.encoding import stored_kind
from activation_store.format.folder_checks import check_ids, check_listed, check_sealed, read_index, read_sealed
from activation_store.format.hdf5 import group_at
from activation_store.format.hdf5_safety import screen
from activation_store.format.manifest import DamagedManifestError, IndexEntry, Manifest, ShardEntry, read_manifest
from activation_store.format.model_tensors import LazyTensor, tensors_entry, write_tensors
from activation_store.format.provenance_versions import convert_provenance
from activation_store.format.schema import (
    INDEX,
    NOT_COMPARED,
    Schema,
    comparable,
    difference,
    manifest_name,
    sealed_name,
    shard_name,
    shard_numbers,
)
from activation_store.format.shard import (
    LAST_UNSEALED,
    SHARD_KIND,
    check_outcome,
    inspect,
    open_shard,
    read_ids,
    read_json,
    reading,
)
from activation_store.writing.queue import Background, Pool
from activation_store.writing.shard_writer import ShardWriter
from activation_store.writing.validation import (
    Arrays,
    check_exact,
    check_kinds,
    check_lists,
    check_table,
    count_overflow,
    encode_batch,
)
from activation_store.writing.virtual_index import write_index
from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json, file_digest, part_of, system_reason, write_whole
from groundscope.core.locks import acquire
from groundscope.core.text import format_count

_WAITING_BYTES = 16 << 20
"""Limit on data pending to be written before `append` blocks: data in the processor's cache is copied faster, and the
system buffers much more before it writes to the disk."""


class StoreWriter:
    """Appends examples to a store; as a context manager it closes at the end, and after an exception sealed shards stay.

    Rows become durable one shard at a time: a shard is written under a temporary name, synced and renamed, and `sealed_ids`
    then contains its examples. A killed run loses the other examples: those of the current shard and of pending writes.
    The next run skips the examples in `sealed_ids` (they are ignored if appended) and ends with the same bytes as an
    uninterrupted run.

    `append` returns after the batch is checked, encoded and copied; a background thread writes it while the caller computes
    the next. A failed write raises its error in the next `append`, `sealed_ids` or `close`.

    Several workers can write into one folder at once, each with its own number, without waiting for each other; the last
    worker to close writes the manifest.

    Parameters
    ----------
    path
        Folder of the store; created if missing.
    schema
        The arrays of each example, and their storage dtype.
    provenance
        Plain JSON values: model, weights, dataset, selections and all other fields that must be equal for all rows. The
        value of the key ``environment`` (package versions, machine) is recorded but can change between runs.
    worker
        Number of this stream of shards, from 0.
    shard_size
        Examples per shard.
    workers
        Number of streams of the store.
    allow_overflow
        Store finite values above the dtype's maximum as the dtype rounds them (infinity); otherwise they are an error.
        They are counted in both cases.
    extra
        Model-level arrays, stored once and read by `ActivationStore.tensor`.

    Raises
    ------
    StoreError
        If the folder holds a store of another model, dataset, selection or dtype (the message names the field, the old and
        the new value), another process writes as the same worker, a sealed shard is damaged, or a write fails.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
    >>> info = ArrayInfo("decoder", "resid_post", "last", n_layers=2, width=3)
    >>> table = {"id": ["a", "b"], "group": ["image1", "image2"], "question": ["Is it a cat?"] * 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StoreWriter(folder, Schema((info,)), {"model": "example"}) as writer:
    ...         writer.append({info.key: np.ones((2, 2, 3), np.float32)}, {**table, "object:cat": [1, 0]})
    ...     store = ActivationStore(folder)
    ...     store.complete, len(store), [array.name for array in store.arrays]
    (True, 2, ['decoder.resid_post/last'])
    """

    def __init__(
        self,
        path: str | Path,
        schema: Schema,
        provenance: Mapping[str, Any],
        *,
        worker: int = 0,
        workers: int = 1,
        shard_size: int = 512,
        allow_overflow: bool = False,
        extra: Mapping[str, np.ndarray | LazyTensor] | None = None,
    ) -> None:
        require_filter(schema.compression)
        hold_hdf5_while_forking()
        if not 0 <= worker < workers or shard_size < 1:
            msg = f"worker={worker} must be 0 to {workers - 1} (workers={workers}), shard_size={shard_size} at least 1"
            raise StoreError(msg)
        self._path = Path(path).absolute()
        self._process = os.getpid()
        self._schema = schema
        # A round trip through JSON, so that comparisons use the stored values: tuples become lists, keys text.
        self._provenance: dict[str, Any] = json.loads(canonical_json(dict(provenance)))
        self._worker, self._workers = worker, workers
        self._owner = f"worker-{worker}."  # part of the names of its temporary files
        self._shard_size = shard_size
        self._allow_overflow = allow_overflow
        self._sealed: dict[str, None] = {}
        self._resumed_ids: frozenset[str] = frozenset()
        self._appended: set[str] = set()
        self._entries: dict[str, ShardEntry] = {}
        self._kinds: dict[str, str] = {}
        self._lists: dict[str, str] = {}
        self._exact: dict[str, str] = {}
        self._shard: ShardWriter | None = None
        self._numbers: set[int] = set()
        self._building: set[ShardWriter] = set()
        self._disk = Background(_WAITING_BYTES)
        self._sealing = Background(1)  # one shard can wait for the disk while the next is written
        self._pool = Pool()
        self._overflow = dict.fromkeys((a.name for a in schema.arrays), 0)
        self._closed = False
        self._before: Manifest | None = None
        self._sealed_log = self._path / sealed_name(worker)
        message = f"{self._path}: worker {worker} is in use by another process; give each process its own worker="
        with self._abandon_on_error():
            self._path.mkdir(parents=True, exist_ok=True)
            # Without locks in the file system, unique temporary names still prevent collisions.
            self._lock = acquire(
                self._path / f".worker-{worker}.lock",
                required=False,
                refuse=lambda _: message,
                transient=True,
                error=StoreError,
            )
        try:
            self._resume()
            if extra is not None:
                write_tensors(self._path, extra, self._owner)
        except BaseException:
            self._lock.release()
            raise

    @property
    def sealed_ids(self) -> KeysView[str]:
        """Ids of the examples in sealed shards, of all workers; a live read-only view.

        It first waits for all pending writes, so that all full shards are sealed.
        """
        self._check_process()
        with self._abandon_on_error():
            self._wait()
        return self._sealed.keys()

    @property
    def overflow(self) -> dict[str, int]:
        """Number of appended values above the dtype's maximum, by array name; all 0 unless allowed."""
        return dict(self._overflow)

    def append(self, arrays: Arrays, table: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
        """Append a batch of examples.

        Parameters
        ----------
        arrays
            Floating arrays [n, L, D], one per array of the schema, by (stack, component, token selection). An example with
            an empty selection has NaN. A ragged array is a `Ragged`.
        table
            Columns of n values: ``id`` and ``group``; optionally ``question``, ``answer``, ``split``, ``kind``, ``level``;
            labels named by concept (``attribute:green``), None or NaN where undefined; further columns of text, numbers,
            lists of either, or lists of lists of numbers of equal length (``boxes``). Every batch must have the same
            columns.

        Raises
        ------
        StoreError
            If arrays or columns do not match the schema or each other, an id is repeated, values overflow the dtype, or a
            write fails. An invalid batch leaves the store unchanged; after a failed write the writer is closed and all
            sealed shards are kept.
        """
        if self._closed:
            msg = f"{self._path}: this writer is closed; open a new one to continue after the sealed shards"
            raise StoreError(msg)
        self._check_process()
        columns = check_table(table)
        kinds = check_kinds(columns, self._kinds)
        lists = check_lists(columns, kinds, self._lists)
        exact = check_exact(columns, kinds, self._exact)
        encoded = encode_batch(arrays, self._schema, len(columns["id"]))
        keep = self._new_rows(columns["id"])
        if len(keep) < len(columns["id"]):
            columns = {name: [column[i] for i in keep] for name, column in columns.items()}
            encoded = {key: value.take(keep) for key, value in encoded.items()}
        overflow = count_overflow(encoded, self._schema.dtype, columns["id"], allowed=self._allow_overflow)
        for name, count in overflow.items():
            self._overflow[name] += count
        self._kinds, self._lists, self._exact = kinds, lists, exact
        self._appended.update(columns["id"])
        at = 0
        with self._abandon_on_error():
            while at < len(keep):
                shard = self._current_shard()
                stop = min(len(keep), at + self._shard_size - shard.rows)
                shard.add(encoded, columns, slice(at, stop))
                at = stop
                if shard.rows == self._shard_size:
                    self._seal()

    def close(self) -> None:
        """Seal the last shard and write the manifest (with several workers: after all have closed); can be repeated."""
        if self._closed:
            return
        self._check_process()
        with self._abandon_on_error():
            if self._shard is not None:
                self._seal()
            self._wait()
            if self._workers > 1:
                own = [entry for name, entry in self._entries.items() if self._is_own(name)]
                write_whole(self._path / manifest_name(self._worker), self._manifest(own).encode(), self._owner)
            if all((self._path / manifest_name(w)).exists() for w in range(self._workers)) or self._workers == 1:
                # The manifest depends only on the sealed shards: if two workers are last at once, they write equal bytes.
                self._collect_entries()
                manifest = self._manifest(self._entries.values(), self._index())
                write_whole(self._path / manifest_name(), manifest.encode(), self._owner)
            self._sealed_log.unlink(missing_ok=True)  # the manifest now holds these digests
        self._end()

    def abandon(self) -> None:
        """Discard incomplete shards and write no manifest, as after a crash; never raise.

        In a forked child it does nothing: the store belongs to the parent.
        """
        if os.getpid() != self._process:
            return
        for thread in (self._disk, self._sealing):
            with contextlib.suppress(Exception):
                thread.wait()  # full shards with pending writes are kept
            thread.stop()
        for shard in self._building:
            shard.discard()
        self._building.clear()
        self._shard = None
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:
            return  # the store belongs to the parent
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        worker = f"worker {self._worker} of {self._workers}"
        return (
            f"StoreWriter({str(self._path)!r}, {worker}, {format_count(len(self._sealed), 'example')} sealed, {state})"
        )

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            msg = (
                f"{self._path}: this writer belongs to process {self._process}, the parent of this forked process; "
                f"open a new writer here, with another worker="
            )
            raise StoreError(msg)

    def _resume(self) -> None:
        for leftover in self._path.glob(f"*.{self._owner}*.part"):
            leftover.unlink()  # this process has the lock: no other process writes the file
        manifests = list(self._manifests())
        listed = {e.file: e for manifest in manifests for e in manifest.shards}
        records = read_sealed(self._path)
        names = _shards_in(self._path)
        old = [self._path / n for n in names if n not in listed or listed[n].version <= LAST_UNSEALED]
        screen(old, SHARD_KIND)
        ids: dict[str, Sequence[str]] = {}
        for name in names:
            path = self._path / name
            if self._is_own(name):
                self._numbers.add((shard_numbers(name) or (0, 0))[1])
            if name in listed:
                check_listed(path, listed[name])
                if listed[name].version <= LAST_UNSEALED:
                    check_outcome(path, screen([path], SHARD_KIND)[0], listed[name])
                self._entries[name] = listed[name]
                ids[name] = listed[name].examples
                continue
            check_sealed(path, records)
            with open_shard(path) as file, reading(path):
                self._check_same(Schema.from_record(read_json(file, "schema")), read_json(file, "provenance"), name)
                ids[name] = read_ids(file)
            if self._is_own(name):
                self._entries[name] = inspect(path)
        check_ids(self._path, ids)
        self._sealed.update(dict.fromkeys(name for names in ids.values() for name in names))
        self._resumed_ids = frozenset(self._sealed)
        self._before = next((m for m in manifests if m.shards == tuple(self._entries.values())), None)
        own = [name for name in names if self._is_own(name)]
        if own:
            self._learn_kinds(own)

    def _learn_kinds(self, own: Sequence[str]) -> None:
        """Determine the kind of each column: from the index, or else from the first shard in which it is not empty."""
        table = read_index(self._path, self._before.index) if self._before is not None else None
        if table is not None:
            self._kinds = {column: stored_kind(column, values) for column, values in table.items()}
            return
        for name in own:
            path = self._path / name
            with open_shard(path, entry=self._entries.get(name)) as file, reading(path):
                unknown = [
                    c for c in columns_in(group_at(file, "examples")) if self._kinds.get(c[0], "empty") == "empty"
                ]
                for column, element in unknown:
                    self._kinds[column] = stored_kind(column, read_column(element))
            if "empty" not in self._kinds.values():
                return

    def _index(self) -> IndexEntry | None:
        path, entries = self._path / INDEX, tuple(self._entries.values())
        entry = self._before.index if self._before is not None and self._before.shards == entries else None
        if (
            entry is not None
            and path.exists()
            and path.stat().st_size == entry.bytes
            and file_digest(path) == entry.sha256
        ):
            return entry
        return write_index(self._path, self._schema, self._provenance, list(self._entries), self._owner)

    def _is_own(self, name: str) -> bool:
        numbers = shard_numbers(name)
        return numbers is not None and numbers[0] == self._worker

    def _manifests(self) -> Iterator[Manifest]:
        # A damaged manifest is skipped: the shards hold the same information.
        for path in sorted(self._path.glob("manifest*.json")):
            try:
                manifest = read_manifest(path)
            except DamagedManifestError:
                continue
            self._check_same(manifest.schema, manifest.provenance, path.name)
            yield manifest

    def _check_same(self, schema: Schema, provenance: Mapping[str, Any], where: str) -> None:
        # A store that an earlier release started is continued with that release's version of provenance.
        self._provenance = convert_provenance(self._provenance, provenance, str(self._path))
        change = difference(comparable(schema, provenance), comparable(self._schema, self._provenance))
        if change is not None:
            field, old, new = change
            msg = (
                f"{self._path}: field '{field}' differs: {where} was written with {old!r}, this run has {new!r}; "
                f"a store holds one model, dataset, selection and dtype; write into another folder"
            )
            raise StoreError(msg)
        # Fields that can differ keep the values of the first run, so that a resumed store equals an uninterrupted one.
        recorded = {key: provenance[key] for key in NOT_COMPARED if key in provenance}
        self._provenance = {**{k: v for k, v in self._provenance.items() if k not in NOT_COMPARED}, **recorded}

    def _new_rows(self, ids: Sequence[Any]) -> list[int]:
        invalid = next((i for i in ids if not isinstance(i, str) or not i), None)
        if invalid is not None or None in ids:
            msg = f"{self._path}: an example has the id {invalid!r}; ids must be non-empty strings"
            raise StoreError(msg)
        batch_ids: set[str] = set()
        for name in ids:
            if name in batch_ids or name in self._appended:
                msg = f"{self._path}: the example '{name}' is appended twice; ids must be unique"
                raise StoreError(msg)
            batch_ids.add(name)
        return [i for i, name in enumerate(ids) if name not in self._resumed_ids]

    def _current_shard(self) -> ShardWriter:
        if self._shard is None:
            # The lowest free number: after a shard is deleted, the next run writes only that shard again.
            number = 0
            while number in self._numbers:
                number += 1
            self._numbers.add(number)
            self._final = self._path / shard_name(self._worker, number)
            temporary = part_of(self._final, self._owner)
            self._shard = ShardWriter(temporary, self._schema, self._provenance, self._disk, self._pool)
            self._building.add(self._shard)
        return self._shard

    def _seal(self) -> None:
        if self._shard is not None:
            self._shard.flush()
            self._disk.submit(partial(self._finish, self._shard, self._final))
            self._shard = None

    def _finish(self, shard: ShardWriter, final: Path) -> None:
        shard.finish()
        # Syncing a shard takes long: blocks of the next shard are written meanwhile.
        self._sealing.submit(partial(self._publish, shard, final), size=1)

    def _publish(self, shard: ShardWriter, final: Path) -> None:
        entry = shard.publish(final, self._log)
        self._building.discard(shard)
        self._entries[entry.file] = entry
        self._sealed.update(dict.fromkeys(entry.examples))

    def _log(self, entry: ShardEntry) -> None:
        try:
            with self._sealed_log.open("a", encoding="ascii") as file:
                file.write(json.dumps({"file": entry.file, "sha256": entry.sha256}) + "\n")
        except OSError:  # no record means no comparison; an incomplete record would give wrong comparisons
            with contextlib.suppress(OSError):
                self._sealed_log.unlink(missing_ok=True)

    def _wait(self) -> None:
        self._disk.wait()
        self._sealing.wait()

    def _collect_entries(self) -> None:
        listed = {e.file: e for manifest in self._manifests() for e in manifest.shards}
        names = _shards_in(self._path)
        for name in names:
            if name not in self._entries:
                self._entries[name] = listed[name] if name in listed else inspect(self._path / name)
        self._entries = {name: self._entries[name] for name in names}

    def _manifest(self, entries: Iterable[ShardEntry], index: IndexEntry | None = None) -> Manifest:
        return Manifest(self._schema, self._provenance, tuple(entries), tensors_entry(self._path), index)

    def _end(self) -> None:
        self._closed = True
        self._disk.stop()
        self._sealing.stop()
        self._lock.release()

    @contextlib.contextmanager
    def _abandon_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # For any error: sealed shards are kept, the rest is discarded and the lock released.
            if hasattr(self, "_lock"):
                self.abandon()
            if not isinstance(error, OSError | RuntimeError):
                raise
            msg = (
                f"{self._path}: cannot be written: {system_reason(error)}; kept: "
                f"{format_count(len(self._sealed), 'example')} in sealed shards, read by ActivationStore; free disk "
                "space and run again to continue from there"
            )
            raise StoreError(msg) from error


def _shards_in(folder: Path) -> list[str]:
    names = [p.name for p in folder.iterdir() if shard_numbers(p.name) is not None]
    return sorted(names, key=lambda name: shard_numbers(name) or (0, 0))
