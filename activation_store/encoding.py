"""How numbers and columns become what HDF5 holds, and back, with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from activation_store.elements import attribute, datasets, mark
from activation_store.layout import (
    CHUNK_ROWS,
    STANDARD_COLUMNS,
    Dtype,
    column_name,
    is_label,
    link_name,
)
from concepts.errors import StoreError

STORAGE: Mapping[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
LARGEST: Mapping[str, float] = {
    "float32": float(np.finfo(np.float32).max),
    "float16": 65504.0,
    "bfloat16": 255.0 * 2.0**120,
}
"""Largest finite value of each dtype."""
Column = np.ndarray
"""A table column: object array of str, float32 (label), float64, int64 or bool; shape [n]."""


@dataclass(frozen=True)
class Encoded:
    """Values as they are stored, and per example how many did not fit or were not finite."""

    stored: np.ndarray
    """[n, L, D] in the storage dtype."""
    overflow: np.ndarray
    """int64 [n]: finite values whose magnitude is beyond the largest of the dtype; stored as it rounds them."""
    nonfinite: np.ndarray
    """int64 [n]: values that came as NaN or infinity; stored as they are."""


def encode(values: np.ndarray, dtype: Dtype) -> Encoded:
    """Convert floating values [n, L, D] to the storage form of a dtype, rounding to nearest, ties to even."""
    finite = np.isfinite(values)
    nonfinite = np.count_nonzero(~finite, axis=(1, 2)).astype(np.int64)
    overflow = np.zeros(len(values), np.int64)
    if np.finfo(values.dtype).max > LARGEST[dtype]:
        overflow = np.count_nonzero((np.abs(values) > LARGEST[dtype]) & finite, axis=(1, 2)).astype(np.int64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            stored = _to_bfloat16(values.astype("<f4", copy=False))
        else:
            stored = values.astype(STORAGE[dtype], copy=False)
    return Encoded(stored, overflow, nonfinite)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored values as float32, exactly."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding half a unit (less one where the kept part is even) carries into the kept part exactly when rounding up.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # A NaN must not carry into infinity: keep its upper half, made quiet only where its payload sat in the lower half.
    upper = bits >> 16
    quiet = np.where(upper & np.uint32(0x7F), upper, upper | np.uint32(0x40))
    return np.where(np.isnan(values), quiet, rounded).astype("<u2")


def array_digest(dataset: h5py.Dataset) -> str:
    """Return the digest of an activation array as the layout defines it, reading a block of rows at a time."""
    digest = hashlib.sha256()
    step = dataset.chunks[0] if dataset.chunks else CHUNK_ROWS
    for start in range(0, len(dataset), step):
        block = np.asarray(dataset[start : start + step])  # [<= 32, L, D]
        digest.update(np.ascontiguousarray(block.swapaxes(0, 1)).data)
    return digest.hexdigest()


def column_digest(values: Column) -> str:
    """Return the digest of a column as the layout defines it."""
    if values.dtype == object:
        return hashlib.sha256("".join(f"{text}\0" for text in values).encode()).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data).hexdigest()


def column_kind(name: str, values: Iterable[Any]) -> str:
    """Return ``label``, ``string``, ``number`` or ``empty`` (nothing but None); raises `StoreError` for a mixture."""
    types = {type(value) for value in values if value is not None}
    numbers = types <= {bool, int, float}
    if is_label(name) and numbers:
        return "label"
    if not types:
        return "empty"
    if numbers:
        return "number"
    if types == {str} and not is_label(name):
        return "string"
    found = ", ".join(sorted(t.__name__ for t in types))
    wanted = "numbers, booleans or None, as it is a label" if is_label(name) else "only text or only numbers"
    msg = f"column '{name}' of the example table holds {found}; it must hold {wanted}"
    raise StoreError(msg)


def stored_kind(name: str, values: Column) -> str:
    """Return the kind of a column that was read back, as `column_kind` has it for what was given."""
    if values.dtype == object:
        return "string" if any(values) else "empty"
    if is_label(name):
        return "label"
    return "empty" if values.dtype.kind == "f" and bool(np.isnan(values).all()) else "number"


def as_column(name: str, values: Sequence[Any]) -> Column:
    """Return plain values as a column; None becomes NaN or the empty string."""
    kind = column_kind(name, values)
    if kind == "string" or (kind == "empty" and name in STANDARD_COLUMNS):
        return np.array([value or "" for value in values], dtype=object)
    if kind == "label":
        return np.array([np.nan if value is None else value for value in values], dtype=np.float32)
    types = {type(value) for value in values}
    if types == {bool}:
        return np.array(values, dtype=bool)
    if values and types <= {int, bool} and all(-(2**63) <= value < 2**63 for value in values):
        return np.array(values, dtype=np.int64)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def write_columns(group: h5py.Group, columns: Mapping[str, Column]) -> None:
    """Write the columns of a shard's table, in order."""
    for position, (name, values) in enumerate(columns.items()):
        if values.dtype == object:
            kind, dataset = "string-column", group.create_dataset(link_name(name), (len(values),), h5py.string_dtype())
            dataset[...] = values
        else:
            kind = "label-column" if is_label(name) else "number-column"
            stored = values if values.dtype == bool else values.astype(values.dtype.newbyteorder("<"))
            dataset = group.create_dataset(link_name(name), data=stored)
        mark(dataset, kind)
        dataset.attrs["position"] = position
        dataset.attrs["sha256"] = column_digest(values)


def read_column(dataset: h5py.Dataset) -> Column:
    """Read one column as it was written."""
    if h5py.check_string_dtype(dataset.dtype):
        return np.asarray(dataset.asstr()[...], dtype=object)
    values = np.asarray(dataset[...])
    return values if values.dtype == bool else values.astype(values.dtype.newbyteorder("="), copy=False)


def read_columns(group: h5py.Group) -> dict[str, Column]:
    """Read every column of a shard's table, in order."""
    found = sorted(datasets(group), key=lambda item: int(attribute(item[1], "position")))
    return {column_name(link): read_column(dataset) for link, dataset in found}


def join_columns(parts: Sequence[tuple[int, Mapping[str, Column]]]) -> dict[str, Column]:
    """Join the tables of several shards (row count, columns); what a shard lacks is missing in its rows."""
    names = dict.fromkeys(name for _, columns in parts for name in columns)
    return {name: _join(name, [(rows, columns.get(name)) for rows, columns in parts]) for name in names}


def _join(name: str, parts: Sequence[tuple[int, Column | None]]) -> Column:
    present = [values for _, values in parts if values is not None]
    if any(values.dtype == object for values in present):
        return np.concatenate([_as_text(rows, values) for rows, values in parts])
    if len(present) < len(parts):
        dtype = np.float32 if is_label(name) else np.float64
        return np.concatenate([np.full(rows, np.nan) if v is None else v for rows, v in parts]).astype(dtype)
    return np.concatenate(present)


def _as_text(rows: int, values: Column | None) -> Column:
    if values is None:
        return np.full(rows, "", dtype=object)
    if values.dtype == object:
        return values
    # A shard in which nothing but None was given holds NaN.
    return np.array(
        ["" if missing else str(value) for missing, value in zip(np.isnan(values), values, strict=True)], object
    )
