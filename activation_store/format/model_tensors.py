"""Model-level arrays (for example an unembedding matrix), stored once next to the shards."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import Dataset

from activation_store.format.buffered_file import create_hdf5
from activation_store.format.hdf5 import attribute, dataset_at, datasets, mark
from activation_store.format.hdf5_safety import examine_in_child
from activation_store.format.manifest import TensorsEntry
from activation_store.format.schema import PLAIN_VERSION, TENSORS, column_name, link_name
from activation_store.format.seal import block_table, read_seal, write_seal
from activation_store.format.shard import check_outcome, open_shard, reading
from groundscope.core.errors import StoreError
from groundscope.core.files import explained, file_digest, part_of, publish
from groundscope.core.text import nearest

KIND = "model-tensors"
"""The ``encoding-type`` of the file."""
_BLOCK_BYTES = 8 << 20
FLOAT16, BFLOAT16 = "float16", "bfloat16"
ENCODED = "encoded-as"
"""Attribute of an array that is read as float32: `FLOAT16`, or 16-bit integers with the bit patterns of `BFLOAT16`."""


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A large array that is computed in blocks of rows: a converted copy of an unembedding can take gigabytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice], np.ndarray]
    """Returns a slice of rows of the first axis."""
    encoding: str = ""
    """`FLOAT16` or `BFLOAT16` for values that are read as float32; else empty. numpy has no bfloat16: the array has its bit
    patterns as 16-bit integers."""
    wide: LazyTensor | None = None
    """The values as float32, as earlier versions stored them; None if they are float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield blocks of rows as contiguous little-endian arrays, with their places."""
        row = max(1, int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize)
        step = max(1, _BLOCK_BYTES // row)
        for start in range(0, self.shape[0], step):
            part = slice(start, min(start + step, self.shape[0]))
            yield part, np.ascontiguousarray(self.read(part), dtype=self.dtype)

    def digest(self) -> str:
        """Return the SHA-256 of dtype, shape and values."""
        h = _header(self.dtype, self.shape)
        for _, block in self.blocks():
            h.update(block.data)
        return h.hexdigest()


def write_tensors(folder: Path, arrays: Mapping[str, np.ndarray | LazyTensor], owner: str = "") -> None:
    """Write ``tensors.h5``, or check that an existing file holds the same arrays.

    Raises
    ------
    StoreError
        If the folder holds other arrays, an array is not numeric, or a write fails.
    """
    plain = {name: _little_endian(name, values) for name, values in arrays.items()}
    path = folder / TENSORS
    if path.exists():
        _check_same(path, plain)
        return
    temporary = part_of(path, owner)
    with explained(lambda reason: f"{path}: the model-level arrays cannot be written: {reason}"):
        temporary.unlink(missing_ok=True)
        try:
            with create_hdf5(temporary) as file:
                mark(file, KIND)
                file.attrs["layout-version"] = PLAIN_VERSION
                for name in sorted(plain):
                    values = plain[name]
                    if isinstance(values, LazyTensor):
                        dataset = file.create_dataset(link_name(name), values.shape, values.dtype, fill_time="never")
                        for part, block in values.blocks():
                            dataset[part] = block
                    else:
                        dataset = file.create_dataset(link_name(name), data=values)
                    mark(dataset, "model-tensor")
                    dataset.attrs["sha256"] = _digest(values)
                    if isinstance(values, LazyTensor) and values.encoding:
                        dataset.attrs[ENCODED] = values.encoding
            seal_tensors(temporary, plain)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_tensor(folder: Path, name: str) -> np.ndarray:
    """Return one model-level array with its original dtype; raise `StoreError`, which lists the names, if it is missing.

    Weights of a model that are stored in 16 bits are read as float32, which changes no value.
    """
    path = folder / TENSORS
    names = tensor_names(folder)
    if name not in names:
        choices = ", ".join(names) or "(it has none)"
        msg = f"{folder}: no tensor '{name}' in this store; choose from {choices}{nearest(name, names)}"
        raise StoreError(msg)
    with open_shard(path, KIND) as file, reading(path):
        dataset = dataset_at(file, link_name(name))
        values = np.asarray(dataset[...])
        encoding = dataset.attrs.get(ENCODED)
        if encoding == BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if encoding == FLOAT16 else values


def tensor_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the model-level arrays, sorted."""
    path = folder / TENSORS
    if not path.exists():
        return ()
    with open_shard(path, KIND) as file, reading(path):
        return tuple(sorted(column_name(link) for link, _ in datasets(file)))


def seal_tensors(path: Path, arrays: Mapping[str, np.ndarray | LazyTensor]) -> None:
    """Seal a finished ``tensors.h5``: the values of each array are one block that HDF5 does not parse."""
    records: list[tuple[int, int, int]] = []
    with h5py.File(path, "r") as file:
        for name, values in arrays.items():
            offset = dataset_at(file, link_name(name)).id.get_offset()
            if offset is not None:
                records.append((offset, values.nbytes, _crc(values)))
    offsets, sizes, digests = np.array(records, np.int64).reshape(-1, 3).T
    write_seal(path, block_table(offsets, sizes, digests))


def _crc(values: np.ndarray | LazyTensor) -> int:
    """Return the CRC-32 of an array's bytes."""
    blocks = (
        (block for _, block in values.blocks()) if isinstance(values, LazyTensor) else (np.ascontiguousarray(values),)
    )
    crc = 0
    for block in blocks:
        crc = zlib.crc32(block.reshape(-1).view(np.uint8).data, crc)
    return crc


def damaged_tensors(folder: Path) -> list[str]:
    """Return the names of the model-level arrays whose values changed after they were written.

    Raises
    ------
    StoreError
        If the file around the values is damaged.
    """
    path = folder / TENSORS
    with reading(path):
        seal = read_seal(path)
        if seal is None:
            outcome = examine_in_child("inspect", [path], KIND)[0]
            check_outcome(path, outcome, None)
            return list((outcome.details or {})["changed"])
    with open_shard(path, KIND) as file, reading(path):
        return damaged_in(file)


def damaged_in(file: h5py.File) -> list[str]:
    """Return the names of the arrays of an open file whose values changed after they were written."""
    arrays = [(column_name(link), data) for link, data in datasets(file)]
    return [name for name, data in arrays if _stored_digest(data) != attribute(data, "sha256")]


def tensors_entry(folder: Path) -> TensorsEntry | None:
    """Return the manifest entry of ``tensors.h5``; None if the file does not exist."""
    path = folder / TENSORS
    if not path.exists():
        return None
    return TensorsEntry(TENSORS, path.stat().st_size, file_digest(path), tensor_names(folder))


def _check_same(path: Path, arrays: Mapping[str, np.ndarray | LazyTensor]) -> None:
    new_digests = {name: _digest(values) for name, values in arrays.items()}
    with open_shard(path, KIND) as file, reading(path):
        digests = {column_name(link): str(attribute(data, "sha256")) for link, data in datasets(file)}
    for name in sorted(digests.keys() | new_digests.keys()):
        old, new = digests.get(name, "nothing"), new_digests.get(name, "nothing")
        values = arrays.get(name)
        wide = values.wide if isinstance(values, LazyTensor) else None
        if old != new and (wide is None or old != wide.digest()):
            msg = (
                f"{path}: field 'extra.{name}' differs: the store has {old}, this run has {new}; "
                f"write into another folder, or use the same model"
            )
            raise StoreError(msg)


def _little_endian(name: str, values: np.ndarray | LazyTensor) -> np.ndarray | LazyTensor:
    plain = values if isinstance(values, LazyTensor) else np.asarray(values)
    if not name or plain.dtype.kind not in "fiub":
        msg = f"extra array '{name}' of dtype {plain.dtype} cannot be stored; give it a name and a numeric or boolean dtype"
        raise StoreError(msg)
    return plain if isinstance(plain, LazyTensor) else np.ascontiguousarray(plain, dtype=plain.dtype.newbyteorder("<"))


def _stored_digest(data: Dataset) -> str:
    if not data.shape:
        return _digest(np.asarray(data[...]))
    return LazyTensor(data.shape, data.dtype, lambda part: data[part]).digest()


def _digest(values: np.ndarray | LazyTensor) -> str:
    if isinstance(values, LazyTensor):
        return values.digest()
    h = _header(values.dtype, values.shape)
    h.update(np.ascontiguousarray(values).data)
    return h.hexdigest()


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    return hashlib.sha256(f"{dtype.str} {shape}\n".encode())
