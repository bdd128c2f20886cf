"""Write the elements of a shard to a file, and publish it under its final name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store.format.columns import write_columns
from activation_store.format.digests import array_digest, arrays_in, blocks, values_of
from activation_store.format.encoding import STORAGE
from activation_store.format.hdf5 import dataset_at, group_at, mark
from activation_store.format.manifest import ShardEntry
from activation_store.format.mapped_file import MappedFile
from activation_store.format.schema import LAYOUT_VERSION, ArrayInfo, Schema
from activation_store.format.seal import block_table, write_seal
from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json, publish_new


def start_shard(file: h5py.File, schema: Schema, provenance: Mapping[str, Any]) -> None:
    """Write the first elements of a shard: schema, provenance and groups."""
    mark(file, "activation-shard")
    file.attrs["layout-version"] = LAYOUT_VERSION
    for name, value in (("schema", schema.record()), ("provenance", dict(provenance))):
        mark(file.create_dataset(name, data=canonical_json(value), dtype=h5py.string_dtype()), "json")
    mark(file.create_group("arrays"), "array-groups")
    mark(file.create_group("digests"), "digest-groups")


def finish_shard(file: h5py.File, columns: Mapping[str, np.ndarray], rows: int) -> None:
    """Write the last element of a shard: the example table."""
    table = file.create_group("examples")
    mark(table, "example-table")
    write_columns(table, columns)
    file.attrs["rows"] = rows


def publish_shard(
    temporary: Path,
    final: Path,
    arrays: Mapping[str, str],
    ids: tuple[str, ...],
    announce: Callable[[ShardEntry], None] | None = None,
) -> ShardEntry:
    """Seal a closed shard, sync it and rename it to its final name; return its manifest entry.

    `announce` is called before the rename, so that the digest is recorded before the final name exists. Raise `StoreError`
    if a file with that name exists.
    """
    with contextlib.closing(h5py.File(MappedFile(temporary), "r")) as file:
        tables = []
        for name, element in arrays_in(file):
            where, digests = blocks(values_of(element)), dataset_at(group_at(file, "digests"), name)[...]
            tables.append(np.stack([where.offsets, where.sizes, digests.astype(np.int64)]).reshape(3, -1))
    sha256 = write_seal(temporary, block_table(*np.concatenate(tables, axis=1)), rows=len(ids))
    entry = ShardEntry(final.name, temporary.stat().st_size, len(ids), sha256, arrays, ids, LAYOUT_VERSION)
    if announce is not None:
        announce(entry)
    try:
        publish_new(temporary, final)
    except FileExistsError as error:
        msg = f"{final} already exists: another writer with the same worker number sealed it; give each its own worker="
        raise StoreError(msg) from error
    return entry


def create_array(
    file: h5py.File, info: ArrayInfo, dtype: str, shape: tuple[int, int, int], **options: Any
) -> tuple[h5py.Group | h5py.Dataset, h5py.Dataset]:
    """Create the element of an array and the dataset of its values: the same object, unless the array is ragged."""
    parent, name = site_group(file, "arrays", info)
    if info.ragged:
        group = parent.create_group(name)
        values = group.create_dataset("values", shape=shape, dtype=STORAGE[dtype], **options)
        mark(values, "ragged-values")
        return group, values
    values = parent.create_dataset(name, shape=shape, dtype=STORAGE[dtype], **options)
    return values, values


def site_group(file: h5py.File, kind: str, info: ArrayInfo) -> tuple[h5py.Group, str]:
    """Return the group of an array's site, created if missing, and the array's name in it."""
    site, name = info.name.split("/")
    group = file.require_group(f"{kind}/{site}")
    if "encoding-type" not in group.attrs:
        mark(group, "site-group")
    return group, name


def describe_array(
    element: h5py.Group | h5py.Dataset,
    values: h5py.Dataset,
    info: ArrayInfo,
    dtype: str,
    digests: np.ndarray,
    *,
    offsets: np.ndarray | None = None,
    overflow: int = 0,
    nonfinite: int = 0,
    order: str = "NLD",
) -> str:
    """Write the attributes, offsets and table of digests of a finished array; return its digest."""
    mark(element, "ragged-array" if info.ragged else "activation-array")
    values.attrs["order"] = order
    element.attrs["dtype"] = dtype
    element.attrs["layers"] = np.asarray(info.layers, np.int64)
    element.attrs["n_heads"] = info.n_heads or 0
    element.attrs["overflow"] = overflow
    element.attrs["nonfinite"] = nonfinite
    if offsets is not None and isinstance(element, h5py.Group):
        mark(element.create_dataset("offsets", data=offsets.astype("<i8")), "offsets")
    parent, name = site_group(element.file, "digests", info)
    mark(parent.create_dataset(name, data=digests.astype("<u4")), "chunk-digests")
    element.attrs["sha256"] = digest = array_digest(digests, offsets)
    return digest
