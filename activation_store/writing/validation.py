"""Validate and encode a batch before any of its rows is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from activation_store.format.encoding import LARGEST, Encoded, as_lists, column_kind, encode, encode_ragged, fits_float
from activation_store.format.ragged import Ragged
from activation_store.format.schema import REQUIRED_COLUMNS, STANDARD_COLUMNS, Dtype, Key, Schema, array_name
from groundscope.core.errors import StoreError
from groundscope.core.text import format_count


def check_arrays(arrays: Mapping[Key, np.ndarray], schema: Schema, n: int) -> dict[Key, np.ndarray]:
    """Return the arrays [n, L, D] of a batch; raise `StoreError` if they do not match the schema."""
    infos = {info.key: info for info in schema.arrays}
    if infos.keys() != arrays.keys():
        missing = ", ".join(sorted(array_name(key) for key in infos.keys() - arrays.keys())) or "none"
        added = ", ".join(sorted(str(key) for key in arrays.keys() - infos.keys())) or "none"
        msg = f"the batch does not fit the schema; arrays missing: {missing}; not in the schema: {added}"
        raise StoreError(msg)
    values = {key: np.asarray(arrays[key]) for key in infos}
    for key, info in infos.items():
        shape, array = (n, info.n_layers, info.width), values[key]
        if array.shape != shape or array.dtype.kind != "f":
            msg = (
                f"the batch of {info.name} has shape {list(array.shape)} and dtype {array.dtype}; "
                f"it must be {list(shape)} (examples of the table, layers, width) of floating numbers"
            )
            raise StoreError(msg)
    return values


def count_overflow(
    encoded: Mapping[Key, Encoded], dtype: Dtype, ids: Sequence[str], *, allowed: bool
) -> dict[str, int]:
    """Count the values too large for the dtype by array name; raise `StoreError` if there are any, unless allowed."""
    counts = {array_name(key): int(e.overflow.sum()) for key, e in encoded.items()}
    for key, e in encoded.items():
        count = counts[array_name(key)]
        if count and not allowed:
            msg = (
                f"{array_name(key)} has {format_count(count, 'value')} beyond the largest of {dtype}, {LARGEST[dtype]:g}; "
                f"first in example '{ids[int(np.argmax(e.overflow > 0))]}'; choose dtype bfloat16 or float32, "
                f"or set allow_overflow=True to store them as {dtype} rounds them"
            )
            raise StoreError(msg)
    return counts


def check_kinds(columns: Mapping[str, Sequence[Any]], before: Mapping[str, str]) -> dict[str, str]:
    """Return the kind of each column so far; raise `StoreError` if names or kinds differ from earlier batches."""
    known_kinds = before or dict.fromkeys(columns, "empty")
    missing, added = sorted(known_kinds.keys() - columns.keys()), sorted(columns.keys() - known_kinds.keys())
    if missing or added:
        msg = (
            f"every batch must have the same columns of the example table; "
            f"missing: {', '.join(missing) or 'none'}; new: {', '.join(added) or 'none'}; "
            f"use None for an undefined value or label"
        )
        raise StoreError(msg)
    kinds = {name: column_kind(name, values) for name, values in columns.items()}
    for name, kind in kinds.items():
        if "empty" not in (kind, known_kinds[name]) and kind != known_kinds[name]:
            msg = f"column '{name}' held {known_kinds[name]} values in earlier batches and holds {kind} values in this one"
            raise StoreError(msg)
    return {name: known_kinds[name] if kind == "empty" else kind for name, kind in kinds.items()}


def check_exact(
    columns: Mapping[str, Sequence[Any]], kinds: Mapping[str, str], before: Mapping[str, str]
) -> dict[str, str]:
    """Return for each number column what determines its dtype so far: ``wide`` integers, or values that need ``float64``.

    Raises
    ------
    StoreError
        If a column would have both: float64 cannot hold such an integer.
    """
    traits_of = dict(before)
    for name, values in columns.items():
        if kinds[name] != "number":
            continue
        wide = next((v for v in values if type(v) is int and int(float(v)) != v), None)
        as_float = any(v is None or type(v) is float or (type(v) is int and not -(2**63) <= v < 2**63) for v in values)
        traits = (
            {traits_of.get(name, "")} | ({"wide"} if wide is not None else set()) | ({"float64"} if as_float else set())
        )
        if {"wide", "float64"} <= traits:
            msg = (
                f"column '{name}' holds integers beyond 2**53{f' ({wide})' if wide is not None else ''} and missing, fractional "
                f"or larger values: such a column is float64, which cannot hold these integers; pass it as text"
            )
            raise StoreError(msg)
        traits_of[name] = max(traits)
    return traits_of


def check_table(table: Mapping[str, Sequence[Any] | np.ndarray]) -> dict[str, list[Any]]:
    """Check names, lengths and kinds of a batch of table columns, and return them as lists of plain values.

    Missing standard columns are filled with empty strings.

    Raises
    ------
    StoreError
        If a required column is missing, lengths differ, a value has a type that cannot be stored, or text holds a
        character that HDF5 cannot store (zero, or half of a surrogate pair).
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in table]
    if missing:
        msg = f"the example table must have the columns {', '.join(missing)}; it has {', '.join(table) or 'no columns'}"
        raise StoreError(msg)
    columns = {name: _plain(values) for name, values in table.items()}
    rows = len(columns["id"])
    columns = {**{name: [""] * rows for name in STANDARD_COLUMNS if name not in columns}, **columns}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        msg = f"columns of the example table differ in length: {lengths}"
        raise StoreError(msg)
    for name, values in columns.items():
        _check_text(name, f"the column name {name!r}")
        kind = column_kind(name, values)
        if kind == "string":
            for value in values:
                if value is not None:
                    _check_text(value, f"column '{name}'")
        if kind in ("number", "label"):
            _check_numbers(name, values, columns["id"])
        if name in STANDARD_COLUMNS and kind not in ("string", "empty"):
            msg = f"column '{name}' must hold text, not {kind} values"
            raise StoreError(msg)
    return columns


def _check_numbers(name: str, values: Sequence[Any], ids: Sequence[Any]) -> None:
    for value, example in zip(values, ids, strict=True):
        if type(value) is int and not fits_float(value):
            msg = (
                f"column '{name}' holds an integer of {value.bit_length()} bits for the example '{example}': "
                f"numbers beyond int64 are stored as float64, whose largest value is 1.8e308; pass it as text"
            )
            raise StoreError(msg)


def _plain(values: Sequence[Any] | np.ndarray) -> list[Any]:
    # numpy scalars become Python values; subclasses of str (also numpy's) become str.
    out = values.tolist() if hasattr(values, "tolist") else list(values)  # type: ignore[union-attr]  # numpy or pandas
    plain = [value.item() if isinstance(value, np.generic) else value for value in out]
    return [str(value) if isinstance(value, str) else value for value in plain]


def _check_text(text: str, where: str) -> None:
    if not text and where.startswith("the column name"):
        msg = "a column of the example table has an empty name"
        raise StoreError(msg)
    try:
        fits = b"\0" not in text.encode()
    except UnicodeEncodeError:
        fits = False
    if not fits:
        msg = f"{where} holds {text[:60]!r}: HDF5 text cannot hold a zero character or half of a surrogate pair"
        raise StoreError(msg)


Arrays = Mapping[Key, "np.ndarray | Ragged"]
"""[n, L, D] by array key; ragged arrays as tokens [T, L, D] with offsets."""


def encode_batch(arrays: Arrays, schema: Schema, n: int) -> dict[Key, Encoded]:
    """Encode the arrays of a batch of n examples for storage; raise `StoreError` if they do not match the schema."""
    ragged = {info.key: info for info in schema.arrays if info.ragged}
    ragged_values = {key: value for key, value in arrays.items() if key in ragged}
    for key, value in ragged_values.items():
        _check_ragged(key, value, n, (ragged[key].n_layers, ragged[key].width))
    # The dense checks get a placeholder of the right shape for each ragged array.
    placeholders = {
        key: np.broadcast_to(np.float32(0), (n, i.n_layers, i.width))
        for key, i in ragged.items()
        if key in ragged_values
    }
    dense = check_arrays({**dict(arrays), **placeholders}, schema, n)  # type: ignore[dict-item]
    out = {}
    for info in schema.arrays:
        value = ragged_values.get(info.key)
        if isinstance(value, Ragged):
            out[info.key] = encode_ragged(np.asarray(value.values), value.offsets, schema.storage(info))
        else:
            out[info.key] = encode(dense[info.key], schema.storage(info))
    return out


def check_lists(
    columns: Mapping[str, Sequence[Any]], kinds: Mapping[str, str], before: Mapping[str, str]
) -> dict[str, str]:
    """Return the item type of each list column; raise `StoreError` if it differs from that of earlier batches."""
    shapes = dict(before)
    for name, values in columns.items():
        if kinds[name] != "list":
            continue
        non_empty = [items for items in as_lists(name, values) if len(items)]
        if not non_empty:
            continue
        first = non_empty[0]
        shape = "text" if isinstance(first, tuple) else "numbers" if first.ndim == 1 else f"{first.shape[1]} numbers"
        if shapes.setdefault(name, shape) != shape:
            msg = (
                f"column '{name}': lists of {shape} in this batch, lists of {shapes[name]} in earlier ones; give all batches "
                f"lists of {shapes[name]}"
            )
            raise StoreError(msg)
    return shapes


def _check_ragged(key: Key, value: object, n: int, sizes: tuple[int, int]) -> None:
    name = array_name(key)
    if not isinstance(value, Ragged):
        msg = f"the batch of {name} must be Ragged(values [T, L, D], offsets [n+1]), not {type(value).__name__}"
        raise StoreError(msg)
    values = np.asarray(value.values)
    if len(value) != n or values.shape[1:] != sizes or values.dtype.kind != "f":
        msg = (
            f"the batch of {name} has {format_count(len(value), 'example')} with tokens of shape "
            f"{list(values.shape[1:])} and dtype {values.dtype}; it must be {n} (examples of the table) with "
            f"{list(sizes)} (layers, width) of floating numbers"
        )
        raise StoreError(msg)
