"""Convert arrays and table columns to their storage types and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_store.format.schema import STANDARD_COLUMNS, Dtype, is_label
from groundscope.core.errors import StoreError

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
_LISTS = frozenset({list, tuple, np.ndarray})
Column = np.ndarray
"""A table column of shape [n]: float32 (label), float64, int64, bool, or objects: str, or lists of one kind (arrays [m] or
[m, k] of int64 or float64, tuples of str)."""


@dataclass(frozen=True)
class Encoded:
    """Values in their storage dtype, with counts per example of those that overflowed or were not finite."""

    stored: np.ndarray
    """[n, L, D] in the storage dtype."""
    overflow: np.ndarray
    """int64 [n]: finite values larger in magnitude than the dtype's maximum; stored as the dtype rounds them."""
    nonfinite: np.ndarray
    """int64 [n]: values that were NaN or infinite; stored unchanged."""
    offsets: np.ndarray | None = None
    """int64 [n+1] of a ragged array: start of each example in `stored` [T, L, D]; None with one row per example."""

    def take(self, rows: Sequence[int]) -> Encoded:
        """Return a selection of the examples."""
        index = np.asarray(rows, np.int64)
        if self.offsets is None:
            return Encoded(self.stored[index], self.overflow[index], self.nonfinite[index])
        parts = [self.stored[self.offsets[i] : self.offsets[i + 1]] for i in index]
        lengths = np.diff(self.offsets)[index]
        stored = np.concatenate([self.stored[:0], *parts])
        return Encoded(stored, self.overflow[index], self.nonfinite[index], np.cumsum([0, *lengths], dtype=np.int64))


def encode(values: np.ndarray, dtype: Dtype) -> Encoded:
    """Convert floating values [n, L, D] to the storage type of a dtype, rounding to nearest, ties to even."""
    nonfinite, overflow = np.zeros((2, len(values)), np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = values.sum(axis=(1, 2))
    # A finite sum proves that all terms are finite: only rows with another sum are searched.
    for row in np.flatnonzero(~np.isfinite(sums)):
        nonfinite[row] = np.count_nonzero(~np.isfinite(values[row]))
    if np.finfo(values.dtype).max > LARGEST[dtype]:
        beyond = (np.abs(values) > LARGEST[dtype]) & np.isfinite(values)
        overflow = np.count_nonzero(beyond, axis=(1, 2)).astype(np.int64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "bfloat16":
            stored = _to_bfloat16(values.astype("<f4", copy=False))
        else:
            stored = values.astype(STORAGE[dtype], copy=False)
    return Encoded(stored, overflow, nonfinite)


def encode_ragged(values: np.ndarray, offsets: np.ndarray, dtype: Dtype) -> Encoded:
    """Convert the tokens [T, L, D] of examples that start at `offsets` [n+1]; counts are per example."""
    flat = encode(values, dtype)
    overflow, nonfinite = (np.diff(np.cumsum([0, *each])[offsets]) for each in (flat.overflow, flat.nonfinite))
    return Encoded(flat.stored, overflow, nonfinite, offsets.astype(np.int64))


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored values as float32, without loss."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding half a unit (less one if the upper half is even) carries into the upper half exactly when rounding up.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # A NaN must not carry into infinity: keep its upper half, made quiet only if its payload was in the lower half.
    upper = bits >> 16
    quiet = np.where(upper & np.uint32(0x7F), upper, upper | np.uint32(0x40))
    return np.where(np.isnan(values), quiet, rounded).astype("<u2")


def column_kind(name: str, values: Iterable[Any]) -> str:
    """Return ``label``, ``string``, ``number``, ``list`` or ``empty`` (only None); raise `StoreError` for a mixture."""
    types = {type(value) for value in values if value is not None}
    if types and types <= _LISTS and not is_label(name) and name not in STANDARD_COLUMNS:
        return "list"
    numbers = types <= {bool, int, float}
    if is_label(name) and numbers:
        return "label"
    if not types:
        return "empty"
    if numbers:
        return "number"
    if types == {str} and not is_label(name):
        return "string"
    names = ", ".join(sorted(t.__name__ for t in types))
    allowed = (
        "numbers, booleans or None, because it is a label"
        if is_label(name)
        else "only text, only numbers or only lists"
    )
    msg = f"column '{name}' of the example table holds {names}; it must hold {allowed}"
    raise StoreError(msg)


def stored_kind(name: str, values: Column) -> str:
    """Return the kind of a column read from a file, as `column_kind` gives it for the original values."""
    if values.dtype == object:
        return "list" if any(not isinstance(v, str) for v in values) else "string" if any(values) else "empty"
    if is_label(name):
        return "label"
    return "empty" if values.dtype.kind == "f" and bool(np.isnan(values).all()) else "number"


def as_column(name: str, values: Sequence[Any]) -> Column:
    """Convert plain values to a column; None becomes NaN or the empty string."""
    kind = column_kind(name, values)
    if kind == "list":
        return as_object_array(as_lists(name, values))
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


def as_lists(name: str, values: Sequence[Any]) -> list[np.ndarray | tuple[str, ...]]:
    """Convert the lists of a column to arrays int64 or float64 [m] or [m, k], or to tuples of text; None is empty.

    Raises
    ------
    StoreError
        If they are not all of text or all of numbers, or their items are lists of unequal length.
    """
    lists = [[] if value is None else list(value) for value in values]
    items = [_plain(item) for values in lists for item in values]
    widths = {len(item) if isinstance(item, list) else 0 for item in items}
    leaves = [leaf for item in items for leaf in (item if isinstance(item, list) else [item])]
    types = {type(leaf) for leaf in leaves}
    if len(widths) > 1 or (widths == {0} and any(isinstance(item, list) for item in items)):
        problem = "items of unequal length"
    elif (row := _first_beyond_float(lists)) is not None:
        problem = f"an integer beyond the largest float64 (in row {row} of the batch)"
    elif types <= {bool, int, float}:
        whole = types <= {bool, int} and all(-(2**63) <= leaf < 2**63 for leaf in leaves)
        shape = (-1, *widths) if widths - {0} else (-1,)
        dtype = np.int64 if whole else np.float64
        return [np.array([_plain(i) for i in row], dtype).reshape(shape if row else (0, *shape[1:])) for row in lists]
    elif types == {str} and widths == {0}:
        unfit = next((leaf for leaf in leaves if "\0" in leaf or not _encodable(leaf)), None)
        if unfit is None:
            return [tuple(str(item) for item in row) for row in lists]
        problem = f"{unfit[:60]!r}: HDF5 text cannot hold a zero character or half of a surrogate pair"
    else:
        problem = f"{', '.join(sorted(t.__name__ for t in types))}"
    msg = (
        f"column '{name}' of the example table holds lists with {problem}; "
        f"they must hold only text, only numbers, or only lists of numbers of one length"
    )
    raise StoreError(msg)


def fits_float(value: int) -> bool:
    """Whether an integer is within the range of float64."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _first_beyond_float(lists: Sequence[Any]) -> int | None:
    for row, items in enumerate(lists):
        for item in map(_plain, items):
            if any(type(v) is int and not fits_float(v) for v in (item if isinstance(item, list) else [item])):
                return row
    return None


def as_object_array(values: Sequence[Any]) -> Column:
    """Return values of any type as an array of objects."""
    out = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        out[i] = value
    return out


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(item: Any) -> Any:
    # numpy values become Python values; numpy strings and other subclasses of str become str.
    plain = item.tolist() if isinstance(item, np.ndarray | np.generic) else item
    if isinstance(plain, tuple):
        plain = list(plain)
    if isinstance(plain, list):
        return [_plain(i) for i in plain]
    return str(plain) if isinstance(plain, str) else plain
