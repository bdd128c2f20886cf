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
from activation_store.format.screening import Outcome, screen
from activation_store.format.seal import changed_blocks, read_seal
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, file_digest, system_number, system_reason

# What reading raises, besides errors of the system, where a flipped byte made another name, type or size of something.
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError)
SHARD_KIND = "activation-shard"
LAST_UNSEALED = 2
"""The last layout version of files without a seal."""


@dataclass(frozen=True)
class Damage:
    """An element of a shard that is not as it was sealed."""

    what: str
    """In words: ``decoder.z [last] layer 3``, ``column 'question'``."""
    rows: tuple[int, ...] | None
    """The rows of the shard it concerns; None for all."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system or HDF5 raises over a file into a `StoreError` that names it.

    An error of the system (too many open files, no memory, no permission) says what it is; only what HDF5 or a value in the
    file contradicts is a `DamagedFileError`.
    """
    try:
        yield
    except StoreError:
        raise
    except MemoryError as error:
        msg = f"{path}: not enough memory to read it; free some, or read fewer examples at a time"
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
    path: Path, kind: str = SHARD_KIND, source: Source | None = None, entry: ShardEntry | None = None
) -> h5py.File:
    """Open a sealed file for reading; HDF5 parses it only after its digests were compared.

    Parameters
    ----------
    path
        The file.
    kind
        The ``encoding-type`` that it must have.
    source
        Where the caller has one: a file that was opened through it before is not compared again.
    entry
        What the manifest lists under this name.

    Raises
    ------
    StoreError
        Where it is truncated, no HDF5 file, HDF5 of another kind, or of a newer layout version.
    """
    if source is None or not source.screened:
        with reading(path):
            outcome = screen([path], kind)[0]
        check_outcome(path, outcome, entry)
    with reading(path):
        source = source or Source(path)
    source.screened = True
    return open_unscreened(path, kind, source)


def check_outcome(path: Path, outcome: Outcome, entry: ShardEntry | None) -> None:
    """Raise `StoreError` where a file is damaged, or not the one that the manifest lists."""
    if outcome.problem is not None:
        if outcome.damaged:
            msg = f"{outcome.problem}; {rebuild_advice(path.name)}"
            raise DamagedFileError(msg)
        raise StoreError(outcome.problem)
    if entry is not None and outcome.digest and outcome.digest != entry.sha256:
        msg = (
            f"{path}: damaged or from another store, its digest is not the one under which this store sealed it; "
            f"{rebuild_advice(path.name)}"
        )
        raise DamagedFileError(msg)


def open_unscreened(path: Path, kind: str, source: Source | None = None) -> h5py.File:
    """Open a file that HDF5 may parse, or in a child process; raises as `open_shard`."""
    with reading(path):
        file = h5py.File(source or Source(path), "r")
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
    """Return the example ids of an open shard, in row order; raises TypeError where they are not text."""
    column = read_column(element_at(file, f"examples/{link_name('id')}"))
    if not all(isinstance(name, str) for name in column):
        msg = "the ids of examples are not text"
        raise TypeError(msg)
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
    """Return a JSON element of an open shard; raises TypeError where it is not an object."""
    value = json.loads(str(dataset_at(file, name).asstr()[()]))
    if not isinstance(value, dict):
        msg = f"'{name}' is not a JSON object"
        raise TypeError(msg)
    return value


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


def inspect(path: Path, *, screened: bool = False) -> ShardEntry:
    """Read a sealed shard through and return its entry; raises `StoreError` where a byte of it changed since.

    With `screened` it is the copy of a file that was compared: HDF5 may parse it.
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
    """Return what the manifest lists of an open shard whose digest is known."""
    arrays = {name: str(attribute(element, "sha256")) for name, element in arrays_in(file)}
    read_rows(file)
    ids = read_ids(file)
    return ShardEntry(path.name, path.stat().st_size, len(ids), sha256, arrays, ids, version_of(file))


def rebuild_advice(name: str) -> str:
    """Return what to do about a shard that is lost."""
    return f"delete {name} and run the same trace again: sealed shards are kept, only its examples are traced again"
