"""Arrays that belong to the model and not to an example (an unembedding matrix, say), kept once beside the shards."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from activation_store.format.buffered_file import written
from activation_store.format.hdf5 import attribute, dataset_at, datasets, mark
from activation_store.format.manifest import TensorsEntry
from activation_store.format.schema import LAYOUT_VERSION, TENSORS, column_name, link_name
from activation_store.format.screening import in_child
from activation_store.format.seal import block_table, read_seal, write_seal
from activation_store.format.shard import check_outcome, open_shard, reading
from groundscope.core.errors import StoreError
from groundscope.core.files import explained, file_digest, part_of, publish

KIND = "model-tensors"
"""The ``encoding-type`` of the file."""


def write_tensors(folder: Path, arrays: Mapping[str, np.ndarray], owner: str = "") -> None:
    """Write ``tensors.h5``, or check that the one there holds the same.

    Raises
    ------
    StoreError
        Where another set of arrays is there already, an array is not numeric, or the disk refuses.
    """
    plain = {name: _little_endian(name, np.asarray(values)) for name, values in arrays.items()}
    path = folder / TENSORS
    if path.exists():
        _check_same(path, {name: _digest(values) for name, values in plain.items()})
        return
    temporary = part_of(path, owner)
    with explained(lambda reason: f"{path}: the model-level arrays cannot be written: {reason}"):
        temporary.unlink(missing_ok=True)
        try:
            with written(temporary) as file:
                mark(file, KIND)
                file.attrs["layout-version"] = LAYOUT_VERSION
                for name in sorted(plain):
                    dataset = file.create_dataset(link_name(name), data=plain[name])
                    mark(dataset, "model-tensor")
                    dataset.attrs["sha256"] = _digest(plain[name])
            seal_tensors(temporary, plain)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_tensor(folder: Path, name: str) -> np.ndarray:
    """Return one model-level array as it was given; raises `StoreError` naming those there are."""
    path = folder / TENSORS
    names = tensor_names(folder)
    if name not in names:
        msg = f"{folder}: no tensor '{name}' is kept beside the activations; there are: {', '.join(names) or 'none'}"
        raise StoreError(msg)
    with open_shard(path, KIND) as file, reading(path):
        return np.asarray(dataset_at(file, link_name(name))[...])


def tensor_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the model-level arrays, sorted."""
    path = folder / TENSORS
    if not path.exists():
        return ()
    with open_shard(path, KIND) as file, reading(path):
        return tuple(sorted(column_name(link) for link, _ in datasets(file)))


def seal_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Seal a finished ``tensors.h5``: the values of each array are a block that HDF5 does not parse."""
    places: list[tuple[int, int, int]] = []
    with h5py.File(path, "r") as file:
        for name, values in arrays.items():
            offset = dataset_at(file, link_name(name)).id.get_offset()
            if offset is not None:
                places.append(
                    (offset, values.nbytes, zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data))
                )
    offsets, sizes, digests = np.array(places, np.int64).reshape(-1, 3).T
    write_seal(path, block_table(offsets, sizes, digests))


def damaged_tensors(folder: Path) -> list[str]:
    """Return the names of the model-level arrays whose values are not those that were written.

    Raises
    ------
    StoreError
        Where the file around the values is damaged.
    """
    path = folder / TENSORS
    with reading(path):
        seal = read_seal(path)
        if seal is None:
            outcome = in_child("inspect", [path], KIND)[0]
            check_outcome(path, outcome, None)
            return list((outcome.details or {})["changed"])
    with open_shard(path, KIND) as file, reading(path):
        return damaged_in(file)


def damaged_in(file: h5py.File) -> list[str]:
    """Return the names of the arrays of an open file whose values are not those that were written."""
    arrays = [(column_name(link), data) for link, data in datasets(file)]
    return [name for name, data in arrays if _digest(np.asarray(data[...])) != attribute(data, "sha256")]


def tensors_entry(folder: Path) -> TensorsEntry | None:
    """Return what the manifest says of ``tensors.h5``; None where there is none."""
    path = folder / TENSORS
    if not path.exists():
        return None
    return TensorsEntry(TENSORS, path.stat().st_size, file_digest(path), tensor_names(folder))


def _check_same(path: Path, wanted: Mapping[str, str]) -> None:
    with open_shard(path, KIND) as file, reading(path):
        there = {column_name(link): str(attribute(data, "sha256")) for link, data in datasets(file)}
    for name in sorted(there.keys() | wanted.keys()):
        old, new = there.get(name, "nothing"), wanted.get(name, "nothing")
        if old != new:
            msg = (
                f"{path}: field 'extra.{name}' differs: the store has {old}, this run brings {new}; "
                f"write into another folder, or with the same model"
            )
            raise StoreError(msg)


def _little_endian(name: str, values: np.ndarray) -> np.ndarray:
    if not name or values.dtype.kind not in "fiub":
        msg = f"extra array '{name}' of dtype {values.dtype} cannot be stored: it needs a name and numbers or booleans"
        raise StoreError(msg)
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))


def _digest(values: np.ndarray) -> str:
    head = f"{values.dtype.str} {values.shape}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()
