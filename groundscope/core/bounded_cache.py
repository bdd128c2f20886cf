"""A cache that is bounded by the total size of its values in bytes, not by their number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """The most recently used values, up to a total number of bytes.

    Parameters
    ----------
    limit
        Largest total number of bytes. A larger value is returned without being stored.
    size
        Returns the size of a value in bytes.
    """

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self._limit, self._size = limit, size
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.held = 0
        """Bytes of all stored values."""

    def __len__(self) -> int:
        return len(self._values)

    def __copy__(self) -> BoundedCache[Value]:
        """Return an empty cache of the same limit: a lock cannot be copied, and the values can be computed again."""
        return BoundedCache(self._limit, self._size)

    def __deepcopy__(self, _memo: object) -> BoundedCache[Value]:
        return self.__copy__()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key; `make` computes it if it is not stored."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        size = self._size(value)
        with self._lock:
            if key not in self._values and size <= self._limit:
                self._values[key] = value, size
                self.held += size
                while self.held > self._limit:
                    _, (_, dropped) = self._values.popitem(last=False)
                    self.held -= dropped
        return value

    def clear(self) -> None:
        """Drop every value."""
        with self._lock:
            self._values.clear()
            self.held = 0
