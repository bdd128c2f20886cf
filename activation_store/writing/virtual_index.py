"""The index: a whole store as one HDF5 file of virtual datasets over its shards, for other HDF5 readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store.format.buffered_file import create_hdf5
from activation_store.format.columns import join_columns, read_columns, read_offsets, write_columns
from activation_store.format.digests import layer_major, values_of
from activation_store.format.encoding import STORAGE
from activation_store.format.hdf5 import element_at, group_at, mark
from activation_store.format.manifest import IndexEntry
from activation_store.format.schema import INDEX, ArrayInfo, Schema
from activation_store.format.shard import open_shard, read_rows, reading
from activation_store.writing.shard_writer import site_group
from groundscope.core.files import canonical_json, file_digest, part_of, publish, same_bytes


def write_index(
    folder: Path, schema: Schema, provenance: Mapping[str, Any], shards: Sequence[str], owner: str = ""
) -> IndexEntry | None:
    """Write ``index.h5`` over the shards of a folder; equal for equal stores, whether or not their runs were interrupted.

    A single repacked shard needs no index: then nothing is written and None is returned.
    """
    path = folder / INDEX
    temporary = part_of(path, owner)
    parts: dict[str, list[tuple[str, int, np.ndarray | None]]] = {a.name: [] for a in schema.arrays}
    tables = []
    for name in shards:
        with open_shard(folder / name) as file, reading(folder / name):
            for info in schema.arrays:
                element = element_at(file, f"arrays/{info.name}")
                if layer_major(element):
                    path.unlink(missing_ok=True)
                    return None
                offsets = read_offsets(element) if isinstance(element, h5py.Group) else None
                length = len(values_of(element))
                parts[info.name].append((name, length, offsets))
            tables.append((read_rows(file), read_columns(group_at(file, "examples"))))
    temporary.unlink(missing_ok=True)
    try:
        with create_hdf5(temporary) as file:
            mark(file, "activation-index")
            file.attrs["layout-version"] = schema.layout_version
            file.attrs["rows"] = sum(rows for rows, _ in tables)
            for name, value in (("schema", schema.record()), ("provenance", dict(provenance))):
                mark(file.create_dataset(name, data=canonical_json(value), dtype=h5py.string_dtype()), "json")
            mark(file.create_group("arrays"), "array-groups")
            for info in schema.arrays:
                _write_virtual(file, info, schema, parts[info.name])
            table = file.create_group("examples")
            mark(table, "example-table")
            write_columns(table, join_columns(tables))
        if same_bytes(temporary, path):
            temporary.unlink()
        else:
            publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return IndexEntry(INDEX, path.stat().st_size, file_digest(path))


def _write_virtual(
    file: h5py.File, info: ArrayInfo, schema: Schema, parts: Sequence[tuple[str, int, np.ndarray | None]]
) -> None:
    parent, name = site_group(file, "arrays", info)
    total = sum(length for _, length, _ in parts)
    if info.ragged:
        parent, name = parent.create_group(name), "values"
    source = f"arrays/{info.name}" + ("/values" if info.ragged else "")
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # otherwise equal stores would differ in their timestamps
    start = 0
    for shard, length, _ in parts:
        if length:
            shape = (length, info.n_layers, info.width)
            space, whole = _space((total, *shape[1:])), _space(shape)
            space.select_hyperslab((start, 0, 0), shape)
            properties.set_virtual(space, shard.encode(), source.encode(), whole)
        start += length
    shape = (total, info.n_layers, info.width)
    dataset_id = h5py.h5d.create(
        parent.id, name.encode(), h5py.h5t.py_create(STORAGE[schema.storage(info)]), _space(shape), dcpl=properties
    )
    element = values = h5py.Dataset(dataset_id)
    if info.ragged:
        element = parent
        mark(values, "ragged-values")
        offsets = [np.zeros(1, np.int64)]
        for _, _, shard_offsets in parts:
            if shard_offsets is not None:
                offsets.append(shard_offsets[1:] + offsets[-1][-1])
        mark(parent.create_dataset("offsets", data=np.concatenate(offsets).astype("<i8")), "offsets")
    mark(element, "ragged-array" if info.ragged else "activation-array")
    element.attrs["dtype"] = schema.storage(info)
    element.attrs["layers"] = np.asarray(info.layers, np.int64)
    element.attrs["n_heads"] = info.n_heads or 0
    if info.heads:
        element.attrs["heads"] = np.asarray(info.heads, np.int64)


def _space(shape: tuple[int, ...]) -> h5py.h5s.SpaceID:
    return h5py.h5s.create_simple(shape)
