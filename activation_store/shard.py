"""One shard: built chunk by chunk under a temporary name, sealed, and from then on only read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store.elements import attribute, dataset_at, datasets, group_at, groups, mark
from activation_store.encoding import (
    STORAGE,
    Encoded,
    array_digest,
    as_column,
    column_digest,
    read_column,
    write_columns,
)
from activation_store.files import explained, file_digest, publish, sync
from activation_store.layout import (
    CHUNK_ROWS,
    LAYOUT_VERSION,
    STANDARD_COLUMNS,
    ArrayInfo,
    Key,
    Schema,
    canonical_json,
    check_version,
    column_name,
    is_label,
    link_name,
)
from activation_store.manifest import ShardEntry
from concepts.errors import StoreError

# What reading raises, besides errors of the system, where a flipped byte made another name, type or size of something.
_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError)


class ShardBuilder:
    """Writes one shard: rows are gathered into blocks of 32, each block goes to disk as one chunk a layer.

    What reaches the file depends only on the rows, not on how they were divided into calls, so that a shard written
    by a resumed run has the same bytes.
    """

    def __init__(self, temporary: Path, schema: Schema, provenance: Mapping[str, Any]) -> None:
        self._temporary = temporary
        self._rows = 0
        self._columns: dict[str, list[Any]] = {}
        self._file = h5py.File(temporary, "w", locking=False)
        try:
            mark(self._file, "activation-shard")
            self._file.attrs["layout-version"] = LAYOUT_VERSION
            for name, value in (("schema", schema.record()), ("provenance", dict(provenance))):
                mark(self._file.create_dataset(name, data=canonical_json(value), dtype=h5py.string_dtype()), "json")
            arrays = self._file.create_group("arrays")
            mark(arrays, "array-groups")
            self._arrays = {info.key: _ArrayBuilder(arrays, info, schema.dtype) for info in schema.arrays}
        except (OSError, RuntimeError):
            self.discard()
            raise

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self._rows

    def add(self, encoded: Mapping[Key, Encoded], table: Mapping[str, Sequence[Any]], rows: slice) -> None:
        """Append some rows of an encoded batch; every batch brings the same columns, the standard ones among them."""
        for key, array in self._arrays.items():
            array.add(encoded[key], rows)
        for name, values in table.items():
            self._columns.setdefault(name, []).extend(values[rows])
        self._rows += rows.stop - rows.start

    def seal(self, final: Path) -> ShardEntry:
        """Finish the shard and give it its final name; returns what the manifest says of it."""
        # Further columns are sorted, labels last, so that the order in which a caller names them changes no byte.
        further = sorted(self._columns.keys() - set(STANDARD_COLUMNS), key=lambda name: (is_label(name), name))
        columns = {name: as_column(name, self._columns[name]) for name in (*STANDARD_COLUMNS, *further)}
        digests = {array.info.name: array.finish() for array in self._arrays.values()}
        table = self._file.create_group("examples")
        mark(table, "example-table")
        write_columns(table, columns)
        self._file.attrs["rows"] = self._rows
        self._file.close()
        sync(self._temporary)
        if final.exists():
            msg = f"{final} is there already: another writer of the same number sealed it; give each its own worker="
            raise StoreError(msg)
        size, sha256 = self._temporary.stat().st_size, file_digest(self._temporary)
        publish(self._temporary, final)
        return ShardEntry(final.name, size, self._rows, sha256, digests, tuple(columns["id"]))

    def discard(self) -> None:
        """Drop the shard; never raises."""
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


class _ArrayBuilder:
    def __init__(self, parent: h5py.Group, info: ArrayInfo, dtype: str) -> None:
        self.info = info
        group_name, self._name = info.name.split("/")
        self._group = parent.require_group(group_name)
        if "encoding-type" not in self._group.attrs:
            mark(self._group, "site-group")
        self._dtype = dtype
        self._block = np.zeros((info.n_layers, CHUNK_ROWS, info.width), STORAGE[dtype])  # [L, 32, D]
        self._filled = 0
        self._dataset: h5py.Dataset | None = None
        self._digest = hashlib.sha256()
        self._overflow = 0
        self._nonfinite = 0

    def add(self, encoded: Encoded, rows: slice) -> None:
        self._overflow += int(encoded.overflow[rows].sum())
        self._nonfinite += int(encoded.nonfinite[rows].sum())
        at = rows.start
        while at < rows.stop:
            n = min(rows.stop - at, CHUNK_ROWS - self._filled)
            self._block[:, self._filled : self._filled + n] = encoded.stored[at : at + n].swapaxes(0, 1)
            self._filled += n
            at += n
            if self._filled == CHUNK_ROWS:
                self._flush()

    def finish(self) -> str:
        self._flush()
        dataset = self._dataset if self._dataset is not None else self._create(1)
        digest = self._digest.hexdigest()
        mark(dataset, "activation-array")
        dataset.attrs["dtype"] = self._dtype
        dataset.attrs["layers"] = np.asarray(self.info.layers, np.int64)
        dataset.attrs["n_heads"] = self.info.n_heads or 0
        dataset.attrs["overflow"] = self._overflow
        dataset.attrs["nonfinite"] = self._nonfinite
        dataset.attrs["sha256"] = digest
        return digest

    def _create(self, chunk_rows: int) -> h5py.Dataset:
        n_layers, width = self.info.n_layers, self.info.width
        self._dataset = self._group.create_dataset(
            self._name,
            shape=(0, n_layers, width),
            maxshape=(None, n_layers, width),
            chunks=(chunk_rows, 1, width),
            dtype=self._block.dtype,
        )
        return self._dataset

    def _flush(self) -> None:
        n = self._filled
        if n == 0:
            return
        # A first block that is not full is the only one: then chunks are clipped to it.
        dataset = self._dataset if self._dataset is not None else self._create(n)
        start, chunk_rows = len(dataset), (dataset.chunks or (n,))[0]
        dataset.resize(start + n, axis=0)
        self._block[:, n:] = 0  # what pads the last chunk must not depend on what was there before
        for layer in range(self.info.n_layers):
            # Handing HDF5 the finished chunk skips its copying and runs at the speed of the disk.
            dataset.id.write_direct_chunk((start, layer, 0), self._block[layer, :chunk_rows].tobytes())
            self._digest.update(self._block[layer, :n].data)
        self._filled = 0


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what HDF5 raises over a damaged file into a `StoreError` that names it."""
    try:
        with explained(lambda reason: f"{path}: damaged or truncated ({reason}); {rebuild_advice(path.name)}"):
            yield
    except StoreError:
        raise
    except _DAMAGE as error:
        msg = f"{path}: damaged, an element cannot be read ({error!r}); {rebuild_advice(path.name)}"
        raise StoreError(msg) from error


def open_shard(path: Path, kind: str = "activation-shard") -> h5py.File:
    """Open a sealed file for reading.

    Raises
    ------
    StoreError
        Where it is truncated, no HDF5 file, HDF5 of another kind, or of a newer layout version.
    """
    with reading(path):
        file = h5py.File(path, "r", locking=False)  # sealed files never change: no lock, so a read-only disk will do
    with reading(path):
        found = file.attrs.get("encoding-type")
        if found != kind:
            file.close()
            msg = f"{path} is HDF5 but not part of an activation store (encoding-type {found!r} instead of '{kind}')"
            raise StoreError(msg)
        version = int(attribute(file, "layout-version"))
    try:
        check_version(version, str(path))
    except StoreError:
        file.close()
        raise
    return file


def read_ids(file: h5py.File) -> tuple[str, ...]:
    """Return the example ids of an open shard, in row order."""
    return tuple(read_column(dataset_at(file, f"examples/{link_name('id')}")))


def read_rows(file: h5py.File) -> int:
    """Return the rows of an open shard; raises KeyError where its table or an array has another number of them."""
    rows = int(attribute(file, "rows"))
    arrays = (array for _, group in groups(group_at(file, "arrays")) for _, array in datasets(group))
    for element in (*arrays, *(column for _, column in datasets(group_at(file, "examples")))):
        if len(element) != rows:
            raise KeyError(element.name)
    return rows


def read_json(file: h5py.File, name: str) -> dict[str, Any]:
    """Return a JSON element of an open shard."""
    return json.loads(str(dataset_at(file, name).asstr()[()]))


def damaged_elements(file: h5py.File) -> list[str]:
    """Return the arrays and columns of an open shard whose values are not those that were sealed."""
    damaged = []
    for group_name, group in groups(group_at(file, "arrays")):
        for tokens, dataset in datasets(group):
            if array_digest(dataset) != str(attribute(dataset, "sha256")):
                damaged.append(f"{group_name} [{tokens}]")
    for link, dataset in datasets(group_at(file, "examples")):
        if column_digest(read_column(dataset)) != str(attribute(dataset, "sha256")):
            damaged.append(f"column '{column_name(link)}'")
    return damaged


def inspect(path: Path) -> ShardEntry:
    """Read a sealed shard through and return its entry; raises `StoreError` where its values changed since."""
    with open_shard(path) as file, reading(path):
        damaged = damaged_elements(file)
        if damaged:
            msg = f"{path}: damaged, the values of {', '.join(damaged)} changed; {rebuild_advice(path.name)}"
            raise StoreError(msg)
        arrays = {
            f"{name}/{tokens}": str(attribute(dataset, "sha256"))
            for name, group in groups(group_at(file, "arrays"))
            for tokens, dataset in datasets(group)
        }
        rows, ids = read_rows(file), read_ids(file)
    return ShardEntry(path.name, path.stat().st_size, rows, file_digest(path), arrays, ids)


def rebuild_advice(name: str) -> str:
    """Return what to do about a shard that is lost."""
    return f"delete {name} and run the same trace again: sealed shards are kept, only its examples are traced anew"
