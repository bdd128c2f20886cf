"""Open a store's folder without reading activations, its shards for reading, and several folders as one store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from activation_store.format.columns import read_columns
from activation_store.format.compression import require_filter
from activation_store.format.digests import stated_digest
from activation_store.format.encoding import Column
from activation_store.format.folder_checks import check_ids, check_listed, check_sealed, read_index, read_sealed
from activation_store.format.hdf5 import element_at, group_at
from activation_store.format.hdf5_safety import screen
from activation_store.format.manifest import IndexEntry, ShardEntry, read_manifest
from activation_store.format.mapped_file import MappedFile
from activation_store.format.provenance_versions import convert_provenance
from activation_store.format.schema import (
    INDEX,
    MANIFEST,
    TENSORS,
    ArrayInfo,
    Key,
    Schema,
    comparable,
    difference,
    shard_numbers,
)
from activation_store.format.shard import (
    SHARD_KIND,
    check_outcome,
    open_shard,
    read_ids,
    read_json,
    read_rows,
    reading,
)
from activation_store.reading.rows import ArrayReader
from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json, file_digest, system_reason
from groundscope.core.text import format_count


@dataclass(frozen=True)
class Folder:
    """The contents of a folder: schema, provenance and sealed shards."""

    path: Path
    schema: Schema
    provenance: Mapping[str, Any]
    shards: tuple[tuple[Path, int], ...]
    """Path and number of rows of each shard, in order."""
    complete: bool
    """Whether a manifest lists exactly these shards."""
    entries: Mapping[str, ShardEntry] = field(default_factory=dict)
    """The manifest's entries, by file name."""
    index: IndexEntry | None = None

    def digest(self) -> str:
        """Return the SHA-256 of the manifest; for an incomplete folder, of the digests of its arrays."""
        if self.complete:
            with reading(self.path / MANIFEST):
                return file_digest(self.path / MANIFEST)
        sealed = []
        for path, _ in self.shards:
            with open_shard(path, entry=self.entries.get(path.name)) as file, reading(path):
                elements = [element_at(file, f"arrays/{a.name}") for a in self.schema.arrays]
                sealed.append([path.name, *map(stated_digest, elements)])
        return hashlib.sha256(canonical_json(sealed).encode()).hexdigest()

    def table(self) -> dict[str, Column] | None:
        """Read the whole example table from the index; None if the index differs from the manifest's entry."""
        return read_index(self.path, self.index) if self.complete else None


def open_folder(folder: Path) -> Folder:
    """Open a folder; raise `StoreError` if it is not a store, or a file is missing or damaged."""
    try:
        return _open_folder(folder)
    except OSError as error:
        msg = f"{error.filename or folder}: cannot be read: {system_reason(error)}"
        raise StoreError(msg) from error


def _open_folder(folder: Path) -> Folder:
    names = _sealed_shards(folder)
    manifest_path = folder / MANIFEST
    manifest = read_manifest(manifest_path) if manifest_path.exists() else None
    listed = {e.file: e for e in manifest.shards} if manifest else {}
    for name, entry in listed.items():
        if name not in names:
            msg = (
                f"{folder / name}: this shard with {format_count(entry.rows, 'example')} ('{entry.examples[0]}' to "
                f"'{entry.examples[-1]}') is missing; run the same trace again: only these examples are traced again"
            )
            raise StoreError(msg)
        check_listed(folder / name, entry)
    schema, provenance = (manifest.schema, manifest.provenance) if manifest else (None, {})
    rows = {name: e.rows for name, e in listed.items()}
    ids = {name: e.examples for name, e in listed.items()}
    newer_names = [name for name in names if name not in listed]
    records = read_sealed(folder)
    screen([folder / name for name in newer_names], SHARD_KIND)  # one call: files without a seal share a process
    for name in newer_names:
        check_sealed(folder / name, records)
        with open_shard(folder / name) as file, reading(folder / name):
            record = Schema.from_record(read_json(file, "schema")), read_json(file, "provenance")
            rows[name], ids[name] = read_rows(file), read_ids(file)
        if schema is None:
            schema, provenance = record
        _check_same(folder / name, (schema, provenance), record)
    if schema is None:
        msg = f"{folder}: it has no sealed shard and no manifest yet; run the trace until the first shard is sealed"
        raise StoreError(msg)
    check_ids(folder, {name: ids[name] for name in names})
    complete = manifest is not None and listed.keys() == set(names)
    shards = tuple((folder / name, rows[name]) for name in names)
    return Folder(folder, schema, provenance, shards, complete, listed, manifest.index if manifest else None)


class OpenShard:
    """A memory-mapped shard, with readers of its arrays that are created on demand.

    No HDF5 file stays open: an open file can crash the interpreter at exit.
    """

    def __init__(self, path: Path, schema: Schema, entry: ShardEntry | None = None) -> None:
        self._path, self._schema = path, schema
        with reading(path):
            outcome = screen([path], SHARD_KIND)[0]
            check_outcome(path, outcome, entry)
            self._source = MappedFile(path)
        self._source.screened = True
        self._readers: dict[Key, ArrayReader] = {}

    def array(self, info: ArrayInfo) -> ArrayReader:
        """Return the reader of an array; raise KeyError if the shard does not have it."""
        if info.key not in self._readers:
            require_filter(self._schema.compression)
            with open_shard(self._path, source=self._source) as file:
                element = element_at(file, f"arrays/{info.name}")
                reader = ArrayReader(self._path, info.name, element, self._source, self._schema.storage(info))
            self._readers[info.key] = reader
        return self._readers[info.key]

    def columns(self) -> dict[str, Column]:
        """Read the example table."""
        with open_shard(self._path, source=self._source) as file:
            return read_columns(group_at(file, "examples"))


def _sealed_shards(path: Path) -> list[str]:
    if path.is_file():
        msg = f"{path} is a file: an activation store is a folder of shard-<worker>-<n>.h5 files with a manifest"
        raise StoreError(msg)
    if not path.is_dir():
        msg = f"no activation store at {path}: no such folder; run a trace into it first"
        raise StoreError(msg)
    names = sorted(p.name for p in path.iterdir())
    shards = sorted((n for n in names if shard_numbers(n)), key=lambda n: shard_numbers(n) or (0, 0))
    if not shards and MANIFEST not in names:
        unfinished = [n for n in names if n.startswith("shard-")]
        other = [n for n in names if n.endswith((".h5", ".hdf5")) and n not in (TENSORS, INDEX)]
        content = "the folder is empty" if not names else f"the folder holds {', '.join(names[:5])}"
        if unfinished:
            content = f"a run started, but has no sealed shard yet ({unfinished[0]}); run it again to the end"
        elif other:
            content = f"{other[0]} is HDF5 but not a shard of a store"
        msg = f"no activation store at {path}: {content}"
        raise StoreError(msg)
    return shards


def _check_same(path: Path, first: tuple[Schema, Mapping[str, Any]], this: tuple[Schema, Mapping[str, Any]]) -> None:
    change = difference(comparable(*first), comparable(*this))
    if change is not None:
        field, old, new = change
        msg = f"{path}: field '{field}' is {new!r}, but {old!r} in the rest of the store; this shard is from another store"
        raise StoreError(msg)


_DATASET = "dataset"
_MERGED = "merged"


def check_mergeable(parts: Sequence[tuple[Folder, Sequence[str]]]) -> None:
    """Raise `StoreError` if folders, each passed with its example ids, cannot be merged into one store."""
    first = parts[0][0]
    where: dict[str, Folder] = {}
    for folder, ids in parts:
        expected = convert_provenance(first.provenance, folder.provenance, str(folder.path))
        provenance = convert_provenance(folder.provenance, first.provenance, str(first.path))
        change = difference(_shared_record(first.schema, expected), _shared_record(folder.schema, provenance))
        if change is not None:
            field, old, new = change
            msg = (
                f"{folder.path} cannot be merged with {first.path}: field '{field}' differs: {new!r} instead of {old!r}; "
                f"one store holds one model, selection and dtype"
            )
            raise StoreError(msg)
        for name in ids:
            if name in where:
                msg = (
                    f"{folder.path} cannot be merged with {where[name].path}: "
                    f"the example '{name}' is in both; ids must be unique"
                )
                raise StoreError(msg)
            where[name] = folder


def provenance_of(folders: Sequence[Folder]) -> dict[str, Any]:
    """Return the provenance of several folders: that of the first, with all datasets if they differ."""
    provenance = dict(folders[0].provenance)
    datasets: list[Any] = []
    for folder in folders:
        entry = folder.provenance.get(_DATASET)
        entries = entry[_MERGED] if isinstance(entry, Mapping) and set(entry) == {_MERGED} else [entry]
        datasets += [dataset for dataset in entries if dataset not in datasets]
    if len(datasets) > 1:
        provenance[_DATASET] = {_MERGED: datasets}
    return provenance


def _shared_record(schema: Schema, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return comparable(schema, {key: value for key, value in provenance.items() if key != _DATASET})
