"""One sealed shard: open it, and find the parts that changed after sealing."""

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

from activation_store.format.buffered_file import open_hdf5
from activation_store.format.columns import column_digest, columns_in, read_column, read_offsets, row_count
from activation_store.format.digests import (
    arrays_in,
    block_rows,
    damaged_blocks,
    layer_major,
    structure_digest,
    values_of,
)
from activation_store.format.hdf5 import attribute, dataset_at, element_at, group_at
from activation_store.format.hdf5_safety import Outcome, screen
from activation_store.format.manifest import ShardEntry
from activation_store.format.mapped_file import MappedFile
from activation_store.format.schema import CHUNK_ROWS, check_version, link_name
from activation_store.format.seal import changed_blocks, read_seal
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, file_digest, system_number, system_reason

# Errors of reading, besides system errors, after a changed byte altered a name, a type or a size.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError)
SHARD_KIND = "activation-shard"
LAST_UNSEALED = 2
"""The last layout version of files without a seal."""


@dataclass(frozen=True)
class Damage:
    """An element of a shard that changed after sealing."""

    what: str
    """Description: ``decoder.z [last] layer 3``, ``column 'question'``."""
    rows: tuple[int, ...] | None
    """The affected rows of the shard; None for all."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors of the system or of HDF5 into a `StoreError` that names the file.

    A system error (too many open files, no memory, no permission) keeps its own message; only invalid HDF5 or an invalid
    value in the file becomes a `DamagedFileError`.
    """
    try:
        yield
    except StoreError:
        raise
    except MemoryError as error:
        msg = f"{path}: not enough memory to read it; free memory, or read fewer examples at a time"
        raise StoreError(msg) from error
    except (OSError, RuntimeError) as error:
        reason = system_reason(error)
        if system_number(error) is not None:
            msg = f"{path}: cannot be read: {reason}"
            raise StoreError(msg) from error
        msg = f"{path}: damaged or truncated ({reason}); {rebuild_advice(path.name)}"
        raise DamagedFileError(msg) from error
    except DAMAGE as error:
        msg = f"{path}: damaged, an element cannot be read ({error!r}); {rebuild_advice(path.name)}"
        raise DamagedFileError(msg) from error


def open_shard(
    path: Path, kind: str = SHARD_KIND, source: MappedFile | None = None, entry: ShardEntry | None = None
) -> h5py.File:
    """Open a sealed file for reading; HDF5 parses it only after its digests are verified.

    Parameters
    ----------
    path
        The file.
    kind
        The required ``encoding-type``.
    source
        An existing memory map of the file, if any: a file that was screened through it is not screened again.
    entry
        The manifest's entry of this file.

    Raises
    ------
    StoreError
        If it is truncated, not an HDF5 file, HDF5 of another kind, or of a newer layout version.
    """
    if source is None or not source.screened:
        with reading(path):
            outcome = screen([path], kind)[0]
        check_outcome(path, outcome, entry)
    with reading(path):
        source = source or MappedFile(path)
    source.screened = True
    return open_unscreened(path, kind, source)


def check_outcome(path: Path, outcome: Outcome, entry: ShardEntry | None) -> None:
    """Raise `StoreError` if a file is damaged, or differs from the manifest's entry."""
    if outcome.problem is not None:
        if outcome.damaged:
            msg = f"{outcome.problem}; {rebuild_advice(path.name)}"
            raise DamagedFileError(msg)
        raise StoreError(outcome.problem)
    if entry is not None and outcome.digest and outcome.digest != entry.sha256:
        msg = (
            f"{path}: damaged or from another store, its digest differs from the one recorded when this store sealed it; "
            f"{rebuild_advice(path.name)}"
        )
        raise DamagedFileError(msg)


def open_unscreened(path: Path, kind: str, source: MappedFile | None = None) -> h5py.File:
    """Open a file without screening it: after `screen`, or in a child process; errors as in `open_shard`."""
    with reading(path):
        file = open_hdf5(source or MappedFile(path), "r")
    try:
        with reading(path):
            encoding = file.attrs.get("encoding-type")
            if not isinstance(encoding, str) or encoding != kind:
                msg = f"{path} is HDF5 but not part of an activation store (encoding-type {encoding!r} instead of '{kind}')"
                raise StoreError(msg)
            version = int(attribute(file, "layout-version"))
        check_version(version, str(path))
    except BaseException:
        file.close()
        raise
    return file


def read_ids(file: h5py.File) -> tuple[str, ...]:
    """Return the example ids of an open shard, in row order; raise TypeError if they are not text."""
    column = read_column(element_at(file, f"examples/{link_name('id')}"))
    if not all(isinstance(name, str) for name in column):
        msg = "the ids of examples are not text"
        raise TypeError(msg)
    return tuple(column)


def read_rows(file: h5py.File) -> int:
    """Return the number of rows of an open shard; raise KeyError if its table or an array has another number."""
    rows = int(attribute(file, "rows"))
    for name, element in arrays_in(file):
        if array_rows(element) != rows:
            raise KeyError(name)
    for name, element in columns_in(group_at(file, "examples")):
        if row_count(element) != rows:
            raise KeyError(name)
    return rows


def array_rows(element: h5py.Dataset | h5py.Group) -> int:
    """Return the number of examples of an array."""
    if isinstance(element, h5py.Dataset) and layer_major(element):
        return element.shape[1]
    return row_count(element)


def read_json(file: h5py.File, name: str) -> dict[str, Any]:
    """Return a JSON element of an open shard; raise TypeError if it is not an object."""
    value = json.loads(str(dataset_at(file, name).asstr()[()]))
    if not isinstance(value, dict):
        msg = f"'{name}' is not a JSON object"
        raise TypeError(msg)
    return value


def version_of(file: h5py.File) -> int:
    """Return the layout version of an open shard."""
    return int(attribute(file, "layout-version"))


def find_damage(path: Path, file: h5py.File) -> list[Damage]:
    """Return the arrays and columns of an open shard whose values changed after sealing."""
    damage = []
    for name, element in arrays_in(file):
        label = "{} [{}]".format(*name.split("/"))
        if version_of(file) == 1:
            if _digest_of_values(values_of(element)) != str(attribute(element, "sha256")):
                damage.append(Damage(label, None))
            continue
        bad = damaged_blocks(path, name, element)
        layers = np.asarray(attribute(element, "layers")).tolist()
        for layer in sorted({layer for _, layer in bad}):
            rows = sorted({row for block, at in bad if at == layer for row in _rows_in(element, block)})
            damage.append(Damage(f"{label} layer {layers[layer]}", tuple(rows)))
    for name, column in columns_in(group_at(file, "examples")):
        if column_digest(read_column(column)) != str(attribute(column, "sha256")):
            damage.append(Damage(f"column '{name}'", None))
    return damage


def _rows_in(element: h5py.Dataset | h5py.Group, block: int) -> range:
    """Return the examples with values in a block of an array."""
    step = block_rows(element)
    start, stop = block * step, (block + 1) * step
    if isinstance(element, h5py.Group):
        offsets = read_offsets(element)
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        return range(first, int(np.searchsorted(offsets, min(stop, offsets[-1]), side="left")))
    return range(start, min(stop, array_rows(element)))


def _digest_of_values(dataset: h5py.Dataset) -> str:
    """Return the version 1 digest of an array, read in blocks of rows."""
    digest = hashlib.sha256()
    step = dataset.chunks[0] if dataset.chunks else CHUNK_ROWS
    for start in range(0, len(dataset), step):
        block = np.asarray(dataset[start : start + step])  # [<= 32, L, D]
        digest.update(np.ascontiguousarray(block.swapaxes(0, 1)).data)
    return digest.hexdigest()


def inspect(path: Path, *, screened: bool = False) -> ShardEntry:
    """Verify a sealed shard and return its manifest entry; raise `StoreError` if a byte changed.

    Set `screened` only for a copy of a file that has been screened: HDF5 then parses it without screening it again.
    """
    with open_unscreened(path, SHARD_KIND) if screened else open_shard(path) as file, reading(path):
        seal = read_seal(path)
        damaged = find_damage(path, file) if seal is None or changed_blocks(path, seal) else []
        if damaged:
            names = ", ".join(d.what for d in damaged)
            msg = f"{path}: damaged, the values of {names} changed; {rebuild_advice(path.name)}"
            raise DamagedFileError(msg)
        if seal is not None:
            return entry_of(path, file, seal.digest)
        return entry_of(path, file, file_digest(path) if version_of(file) == 1 else structure_digest(path, file))


def entry_of(path: Path, file: h5py.File, sha256: str) -> ShardEntry:
    """Return the manifest entry of an open shard with the given digest."""
    arrays = {name: str(attribute(element, "sha256")) for name, element in arrays_in(file)}
    read_rows(file)
    ids = read_ids(file)
    return ShardEntry(path.name, path.stat().st_size, len(ids), sha256, arrays, ids, version_of(file))


def rebuild_advice(name: str) -> str:
    """Return the advice for a lost shard."""
    return f"delete {name} and run the same trace again: sealed shards are kept, only its examples are traced again"
