"""Write and read the columns of the example table in HDF5, with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import h5py
import numpy as np

from activation_store.format.encoding import Column, as_object_array
from activation_store.format.hdf5 import attribute, dataset_at, elements, mark
from activation_store.format.schema import column_name, is_label, link_name

_KINDS = frozenset({"string-column", "label-column", "number-column", "list-column"})


def holds_lists(values: Column) -> bool:
    """Whether a column holds lists."""
    return values.dtype == object and not set(map(type, values)) <= {str}


def freeze(values: np.ndarray) -> np.ndarray:
    """Return a read-only view of an array."""
    values = values.view()
    values.setflags(write=False)
    return values


def column_digest(values: Column) -> str:
    """Return the digest of a column, as `activation_store.format.schema` defines it."""
    if holds_lists(values):
        flat, offsets = _flat(values)
        return hashlib.sha256(_plain_bytes(offsets) + _plain_bytes(flat)).hexdigest()
    return hashlib.sha256(_plain_bytes(values)).hexdigest()


def _plain_bytes(values: np.ndarray) -> bytes:
    if values.dtype == object:
        return "\0".join([*values, ""]).encode()
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()


def _flat(values: Column) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated items of all lists, and the start of each list, int64 [n+1]."""
    offsets = np.cumsum([0, *(len(items) for items in values)], dtype=np.int64)
    if any(isinstance(items, tuple) for items in values):
        return as_object_array([item for items in values for item in items]), offsets
    # Empty lists do not have the item width of the others.
    non_empty = [items for items in values if len(items)]
    return np.concatenate(non_empty) if non_empty else np.zeros(0, np.int64), offsets


def write_columns(group: h5py.Group, columns: Mapping[str, Column]) -> None:
    """Write the columns of a shard's table, in order."""
    for position, (name, values) in enumerate(columns.items()):
        if holds_lists(values):
            kind, dataset = "list-column", _write_lists(group.create_group(link_name(name)), values)
        elif values.dtype == object:
            kind, dataset = "string-column", group.create_dataset(link_name(name), (len(values),), h5py.string_dtype())
            dataset[...] = values
        else:
            kind = "label-column" if is_label(name) else "number-column"
            stored = values if values.dtype == bool else values.astype(values.dtype.newbyteorder("<"))
            dataset = group.create_dataset(link_name(name), data=stored)
        mark(dataset, kind)
        dataset.attrs["position"] = position
        dataset.attrs["sha256"] = column_digest(values)


def _write_lists(group: h5py.Group, values: Column) -> h5py.Group:
    flat, offsets = _flat(values)
    if flat.dtype == object:
        mark(group.create_dataset("values", (len(flat),), h5py.string_dtype()), "list-values")
        dataset_at(group, "values")[...] = flat
    else:
        mark(group.create_dataset("values", data=flat.astype(flat.dtype.newbyteorder("<"))), "list-values")
    mark(group.create_dataset("offsets", data=offsets.astype("<i8")), "offsets")
    return group


def read_column(element: h5py.Dataset | h5py.Group) -> Column:
    """Read one column as it was written."""
    if isinstance(element, h5py.Group):
        flat, offsets = read_column(dataset_at(element, "values")), read_offsets(element)
        parts = [flat[a:b] for a, b in pairwise(offsets)]
        return as_object_array([tuple(p) if flat.dtype == object else freeze(p) for p in parts])
    if h5py.check_string_dtype(element.dtype):
        return np.asarray(element.asstr()[...], dtype=object)
    values = np.asarray(element[...])
    return values if values.dtype == bool else values.astype(values.dtype.newbyteorder("="), copy=False)


def read_offsets(group: h5py.Group) -> np.ndarray:
    """Return the offsets int64 [N+1] of a ragged element; raise KeyError if they do not match its values."""
    offsets, values = np.asarray(dataset_at(group, "offsets")[...], np.int64), dataset_at(group, "values")
    items = values.shape[1] if values.attrs.get("order") == "LND" else len(values)
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != items or (np.diff(offsets) < 0).any():
        raise KeyError(group.name)
    return offsets


def columns_in(group: h5py.Group) -> list[tuple[str, h5py.Dataset | h5py.Group]]:
    """Return the columns of a shard's table that this version supports, by name and in order."""
    columns = [(column_name(link), element) for link, element in elements(group)]
    supported = [item for item in columns if item[1].attrs.get("encoding-type") in _KINDS]
    return sorted(supported, key=lambda item: int(attribute(item[1], "position")))


def read_columns(group: h5py.Group) -> dict[str, Column]:
    """Read every column of a shard's table, in order."""
    return {name: read_column(element) for name, element in columns_in(group)}


def row_count(element: h5py.Dataset | h5py.Group) -> int:
    """Return the number of rows of a column or an array [N, L, D]."""
    return len(dataset_at(element, "offsets")) - 1 if isinstance(element, h5py.Group) else len(element)


def join_columns(parts: Sequence[tuple[int, Mapping[str, Column]]]) -> dict[str, Column]:
    """Join the tables of several shards (row count, columns); a column that a shard lacks is missing in its rows."""
    names = dict.fromkeys(name for _, columns in parts for name in columns)
    return {name: _join(name, [(rows, columns.get(name)) for rows, columns in parts]) for name in names}


def _join(name: str, parts: Sequence[tuple[int, Column | None]]) -> Column:
    present = [values for _, values in parts if values is not None]
    if any(holds_lists(values) for values in present):
        return as_object_array([item for rows, values in parts for item in _as_lists(rows, values)])
    if any(values.dtype == object for values in present):
        return np.concatenate([_as_text(rows, values) for rows, values in parts])
    if len(present) < len(parts):
        dtype = np.float32 if is_label(name) else np.float64
        return np.concatenate([np.full(rows, np.nan) if v is None else v for rows, v in parts]).astype(dtype)
    return np.concatenate(present)


def _as_lists(rows: int, values: Column | None) -> Iterable[Any]:
    # A shard whose values were all None holds no lists.
    return values if values is not None and holds_lists(values) else [freeze(np.zeros(0, np.int64))] * rows


def _as_text(rows: int, values: Column | None) -> Column:
    if values is None:
        return np.full(rows, "", dtype=object)
    if values.dtype == object:
        return values
    # A shard whose values were all None holds NaN.
    return np.array(
        ["" if missing else str(value) for missing, value in zip(np.isnan(values), values, strict=True)], object
    )
