"""Which examples have given values in the columns of the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.format.columns import is_lists
from activation_store.format.encoding import Column
from activation_store.format.schema import is_label
from groundscope.core.errors import StoreError


def matching(columns: Mapping[str, Column], wanted: Mapping[str, Any], n: int, path: Path) -> np.ndarray:
    """Return the rows int64 [m] in which every column has the value, or one of the values, asked for.

    Raises
    ------
    StoreError
        Where there is no such column, or its values cannot be compared with the one asked for.
    """
    keep = np.ones(n, dtype=bool)
    for name, value in wanted.items():
        if name not in columns and n:
            kind = "label" if is_label(name) else "column"
            there = ", ".join(c for c in columns if is_label(c) == is_label(name)) or "none"
            msg = f"{path}: {kind} '{name}' not in store: there are {there}"
            raise StoreError(msg)
        if n:
            options = list(value) if isinstance(value, list | tuple | set | frozenset | np.ndarray) else [value]
            keep &= np.logical_or.reduce([_equals(name, columns[name], option, path) for option in options], axis=0)
    return np.flatnonzero(keep)


def _equals(name: str, values: Column, wanted: Any, path: Path) -> np.ndarray:
    text = values.dtype == object
    if is_lists(values):
        problem = "it holds lists"
    elif wanted is None:
        return values == "" if text else np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    elif (text and isinstance(wanted, str)) or (
        not text and isinstance(wanted, bool | int | float | np.bool_ | np.number)
    ):
        return values == wanted
    else:
        problem = f"it holds {'text' if text else 'numbers'}"
    msg = f"{path}: column '{name}' cannot be compared with {wanted!r}: {problem}"
    raise StoreError(msg)
