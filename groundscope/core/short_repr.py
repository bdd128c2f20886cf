"""A `repr` for results with many values: the class and its fields, arrays by type and shape, collections by size."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence, Set
from typing import Any

MAX_LINES = 5
WIDTH = 110
_MAX_TEXT = 60
_MAX_ITEMS = 4


def short_repr(self: Any) -> str:
    """Return the class of a dataclass and a summary of its fields, in at most five lines.

    Arrays are shown as type and shape, long collections as their size, long texts shortened; fields that are None or empty
    are not shown. Use it as ``__repr__ = short_repr`` in the body of the class.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from groundscope.core.short_repr import short_repr
    >>> @dataclass(frozen=True)
    ... class Result:
    ...     effects: np.ndarray
    ...     ids: tuple[str, ...]
    ...     metric: str
    ...     __repr__ = short_repr
    >>> Result(np.zeros((60, 6, 8), np.float32), tuple("abcdefgh"), "logit_difference")
    Result(effects=float32 [60, 6, 8], ids=8 values, metric='logit_difference')
    """
    parts = [
        f"{field.name}={summary}"
        for field in dataclasses.fields(self)
        if field.repr and (summary := summarize(getattr(self, field.name)))
    ]
    text = f"{type(self).__name__}({', '.join(parts)})"
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], "    …)"]
    return "\n".join(lines)


def summarize(value: Any) -> str:
    """Return a value in a few words; an empty text for None and empty collections.

    Examples
    --------
    >>> from groundscope.core.short_repr import summarize
    >>> summarize({"a": 1, "b": 2}), summarize((1, 2)), summarize(list(range(9))), summarize(0.123456), summarize(None)
    ('2 entries', '(1, 2)', '9 values', '0.1235', '')
    """
    if value is None:
        return ""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} [{', '.join(map(str, value.shape))}]" if value.shape else f"{float(value):.4g}"
    if isinstance(value, str):
        text = value if len(value) <= _MAX_TEXT else f"{value[: _MAX_TEXT - 1]}…"
        return repr(text)
    if isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}" if value else ""
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes):
        return _collection(value)
    if dataclasses.is_dataclass(value):
        text = str(value) if type(value).__str__ is not object.__str__ else ""
        return text if text and len(text) <= _MAX_TEXT and "\n" not in text else type(value).__name__
    text = repr(value)
    return text if len(text) <= _MAX_TEXT and "\n" not in text else type(value).__name__


def _collection(value: Sequence[Any] | Set[Any]) -> str:
    if not value:
        return ""
    plain = all(isinstance(item, str | int | float | bool) for item in value)
    if isinstance(value, tuple | list) and plain and len(value) <= _MAX_ITEMS:
        text = repr(value)
        if len(text) <= _MAX_TEXT:
            return text
    return f"{len(value)} {'value' if len(value) == 1 else 'values'}"
