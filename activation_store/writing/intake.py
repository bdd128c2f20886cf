"""Check and encode a batch before its rows are written to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from activation_store.format.encoding import Encoded, as_lists, encode, encode_ragged
from activation_store.format.ragged import Ragged
from activation_store.format.schema import Key, Schema, array_name
from activation_store.writing.validation import check_arrays
from groundscope.core.errors import StoreError

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
            out[info.key] = encode_ragged(np.asarray(value.values), value.offsets, schema.dtype)
        else:
            out[info.key] = encode(dense[info.key], schema.dtype)
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
            msg = f"column '{name}' held lists of {shapes[name]} in earlier batches and holds lists of {shape} in this one"
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
            f"the batch of {name} has {len(value)} examples with tokens of shape {list(values.shape[1:])} and dtype "
            f"{values.dtype}; it must be {n} (examples of the table) with {list(sizes)} (layers, width) of floating numbers"
        )
        raise StoreError(msg)
