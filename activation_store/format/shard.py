"""One sealed shard: opening it, and finding what in it is not as it was sealed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store.format.columns import column_digest, columns_in, read_column, read_offsets, rows_of
from activation_store.format.digests import (
    arrays_in,
    block_rows,
    damaged_blocks,
    layer_major,
    structure_digest,
    values_of,
)
from activation_store.format.hdf5 import attribute, dataset_at, element_at, group_at
from activation_store.format.manifest import ShardEntry
from activation_store.format.mapped_file import Source
from activation_store.format.schema import CHUNK_ROWS, check_version, link_name
from groundscope.core.errors import StoreError
from groundscope.core.files import explained, file_digest

# What reading raises, besides errors of the system, where a flipped byte made another name, type or size of something.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Damage:
    """An element of a shard that is not as it was sealed."""

    what: str
    """In words: ``decoder.z [last] layer 3``, ``column 'question'``."""
    rows: tuple[int, ...] | None
    """The rows of the shard it concerns; None for all."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what HDF5 raises over a damaged file into a `StoreError` that names it."""
    try:
        with explained(lambda reason: f"{path}: damaged or truncated ({reason}); {rebuild_advice(path.name)}"):
            yield
    except StoreError:
        raise
    except DAMAGE as error:
        msg = f"{path}: damaged, an element cannot be read ({error!r}); {rebuild_advice(path.name)}"
        raise StoreError(msg) from error


def open_shard(path: Path, kind: str = "activation-shard", source: Source | None = None) -> h5py.File:
    """Open a sealed file for reading, from its `Source` where the caller has one.

    Raises
    ------
    StoreError
        Where it is truncated, no HDF5 file, HDF5 of another kind, or of a newer layout version.
    """
    with reading(path):
        file = h5py.File(source or Source(path), "r")
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
    column = read_column(element_at(file, f"examples/{link_name('id')}"))
    return tuple(column)


def read_rows(file: h5py.File) -> int:
    """Return the rows of an open shard; raises KeyError where its table or an array has another number of them."""
    rows = int(attribute(file, "rows"))
    for name, element in arrays_in(file):
        if array_rows(element) != rows:
            raise KeyError(name)
    for name, element in columns_in(group_at(file, "examples")):
        if rows_of(element) != rows:
            raise KeyError(name)
    return rows


def array_rows(element: h5py.Dataset | h5py.Group) -> int:
    """Return how many examples an array holds."""
    if isinstance(element, h5py.Dataset) and layer_major(element):
        return element.shape[1]
    return rows_of(element)


def read_json(file: h5py.File, name: str) -> dict[str, Any]:
    """Return a JSON element of an open shard."""
    return json.loads(str(dataset_at(file, name).asstr()[()]))


def version_of(file: h5py.File) -> int:
    """Return the layout version of an open shard."""
    return int(attribute(file, "layout-version"))


def find_damage(path: Path, file: h5py.File) -> list[Damage]:
    """Return the arrays and columns of an open shard whose values are not those that were sealed."""
    found = []
    for name, element in arrays_in(file):
        label = "{} [{}]".format(*name.split("/"))
        if version_of(file) == 1:
            if _digest_of_values(values_of(element)) != str(attribute(element, "sha256")):
                found.append(Damage(label, None))
            continue
        bad = damaged_blocks(path, name, element)
        layers = np.asarray(attribute(element, "layers")).tolist()
        for layer in sorted({layer for _, layer in bad}):
            rows = sorted({row for block, at in bad if at == layer for row in _rows_in(element, block)})
            found.append(Damage(f"{label} layer {layers[layer]}", tuple(rows)))
    for name, column in columns_in(group_at(file, "examples")):
        if column_digest(read_column(column)) != str(attribute(column, "sha256")):
            found.append(Damage(f"column '{name}'", None))
    return found


def _rows_in(element: h5py.Dataset | h5py.Group, block: int) -> range:
    """Return the examples that have values in a block of an array."""
    step = block_rows(element)
    start, stop = block * step, (block + 1) * step
    if isinstance(element, h5py.Group):
        offsets = read_offsets(element)
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        return range(first, int(np.searchsorted(offsets, min(stop, offsets[-1]), side="left")))
    return range(start, min(stop, array_rows(element)))


def _digest_of_values(dataset: h5py.Dataset) -> str:
    """Return the digest that version 1 has of an array, reading a block of rows at a time."""
    digest = hashlib.sha256()
    step = dataset.chunks[0] if dataset.chunks else CHUNK_ROWS
    for start in range(0, len(dataset), step):
        block = np.asarray(dataset[start : start + step])  # [<= 32, L, D]
        digest.update(np.ascontiguousarray(block.swapaxes(0, 1)).data)
    return digest.hexdigest()


def shard_digest(path: Path, file: h5py.File) -> str:
    """Return what the manifest has as the SHA-256 of a shard, of its version."""
    return file_digest(path) if version_of(file) == 1 else structure_digest(path, file)


def inspect(path: Path) -> ShardEntry:
    """Read a sealed shard through and return its entry; raises `StoreError` where its values changed since."""
    with open_shard(path) as file, reading(path):
        damaged = find_damage(path, file)
        if damaged:
            names = ", ".join(d.what for d in damaged)
            msg = f"{path}: damaged, the values of {names} changed; {rebuild_advice(path.name)}"
            raise StoreError(msg)
        arrays = {name: str(attribute(element, "sha256")) for name, element in arrays_in(file)}
        read_rows(file)
        ids, sha256, version = read_ids(file), shard_digest(path, file), version_of(file)
    return ShardEntry(path.name, path.stat().st_size, len(ids), sha256, arrays, ids, version)


def rebuild_advice(name: str) -> str:
    """Return what to do about a shard that is lost."""
    return f"delete {name} and run the same trace again: sealed shards are kept, only its examples are traced anew"
