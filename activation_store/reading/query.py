"""Find examples by their values in the columns of the example table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.format.columns import holds_lists
from activation_store.format.encoding import Column
from activation_store.format.schema import is_label
from groundscope.core.errors import StoreError
from groundscope.core.text import nearest


def find_rows(columns: Mapping[str, Column], conditions: Mapping[str, Any], n: int, path: Path) -> np.ndarray:
    """Return the rows int64 [m] in which every column has the requested value, or one of the requested values.

    Raises
    ------
    StoreError
        If there is no such column, or its values cannot be compared with the requested one.
    """
    keep = np.ones(n, dtype=bool)
    for name, value in conditions.items():
        if name not in columns and n:
            kind = "label" if is_label(name) else "column"
            names = [c for c in columns if is_label(c) == is_label(name)]
            msg = (
                f"{path}: {kind} '{name}' not in store; choose from {', '.join(names) or 'none'}{nearest(name, names)}"
            )
            raise StoreError(msg)
        if n:
            options = list(value) if isinstance(value, list | tuple | set | frozenset | np.ndarray) else [value]
            keep &= np.logical_or.reduce([_equals(name, columns[name], option, path) for option in options], axis=0)
    return np.flatnonzero(keep)


def _equals(name: str, values: Column, target: Any, path: Path) -> np.ndarray:
    text = values.dtype == object
    if holds_lists(values):
        problem = "it holds lists"
    elif target is None:
        return values == "" if text else np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    elif (text and isinstance(target, str)) or (
        not text and isinstance(target, bool | int | float | np.bool_ | np.number)
    ):
        return values == target
    else:
        problem = f"it holds {'text' if text else 'numbers'}"
    msg = f"{path}: column '{name}' cannot be compared with {target!r}: {problem}"
    raise StoreError(msg)
