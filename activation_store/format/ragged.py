"""Ragged arrays: one vector per token, with a different number of tokens per example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from groundscope.core.errors import StoreError
from groundscope.core.short_repr import short_repr


@dataclass(frozen=True, eq=False)
class Ragged(Sequence[np.ndarray]):
    """The concatenated tokens of several examples; item i is the array of example i.

    Raises
    ------
    StoreError
        If the offsets do not fit the values.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import Ragged
    >>> tokens = Ragged.of([np.zeros((2, 4)), np.ones((3, 4))])
    >>> tokens.lengths, tokens[1].shape
    (array([2, 3]), (3, 4))
    """

    values: np.ndarray
    """[T, D] when read from a store, [T, L, D] when passed to a writer."""
    offsets: np.ndarray
    """int64 [n+1]: example i has the tokens ``offsets[i]`` to ``offsets[i+1]-1``; no token if its selection is empty."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        offsets = np.asarray(self.offsets)
        whole = offsets.ndim == 1 and len(offsets) and offsets.dtype.kind in "iu" and offsets[0] == 0
        if not whole or offsets[-1] != len(self.values) or (np.diff(offsets.astype(np.int64)) < 0).any():
            msg = (
                f"offsets of shape {list(offsets.shape)} and dtype {offsets.dtype} do not fit {len(self.values)} tokens: "
                f"give n+1 integers that start at 0, never decrease, and end with the number of tokens"
            )
            raise StoreError(msg)
        object.__setattr__(self, "offsets", offsets.astype(np.int64))

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> Ragged:
        """Concatenate the arrays [T_i, …] of several examples; at least one, to determine the other axes."""
        if not len(parts):
            msg = "no example to join: give Ragged(values, offsets) with values of shape [0, L, D] and offsets [0]"
            raise StoreError(msg)
        return cls(np.concatenate([np.asarray(p) for p in parts]), np.cumsum([0, *map(len, parts)], dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64 [n]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Ragged:
        if isinstance(index, slice):
            parts = [self[i] for i in range(*index.indices(len(self)))]
            return Ragged.of(parts) if parts else Ragged(self.values[:0], np.zeros(1, np.int64))
        at = range(len(self))[index]
        return self.values[self.offsets[at] : self.offsets[at + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))
