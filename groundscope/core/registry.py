"""Open registries: built-in entries, entries that a user registers, and entries of installed packages.

A package adds entries without changing this one, by an entry point in its ``pyproject.toml``::

    [project.entry-points."groundscope.loaders"]
    my_format = "my_package.loader:load"
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Generic, TypeVar

from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.text import nearest

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Registry(Mapping[str, T], Generic[T]):
    """A table of named entries that users may extend; reads like a mapping, in order of registration.

    Parameters
    ----------
    kind
        Name of an entry in messages, such as ``"loader"``.
    entries
        Built-in entries by name.
    group
        Entry-point group of installed packages, read on the first search or listing beyond the built-in entries.
    check
        Returns the problem of a new entry, or None if it is valid.
    error
        Class of the exception for an unknown name.

    Examples
    --------
    >>> from groundscope.core.registry import Registry
    >>> shapes = Registry("shape", {"circle": 0, "square": 4})
    >>> shapes.register("triangle", 3)
    >>> list(shapes), shapes["triangle"]
    (['circle', 'square', 'triangle'], 3)
    >>> shapes["sqare"]
    Traceback (most recent call last):
    groundscope.core.errors.ConfigError: unknown shape 'sqare'; choose from circle, square, triangle; did you mean square?
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, T],
        *,
        group: str | None = None,
        check: Callable[[T], str | None] | None = None,
        error: type[GroundscopeError] = ConfigError,
    ) -> None:
        self._kind = kind
        self._entries: dict[str, T] = dict(entries)
        self._group = group
        self._check = check
        self._error = error
        self._origins: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._points: dict[str, EntryPoint] | None = None

    def register(self, name: str, entry: T, *, replace: bool = False) -> None:
        """Add an entry.

        Parameters
        ----------
        name
            Its name.
        entry
            The entry.
        replace
            Whether to replace an existing entry of that name.

        Raises
        ------
        ConfigError
            If the name is in use and `replace` is False, or the entry is invalid.
        """
        if not replace and (name in self._entries or name in self._read_points()):
            msg = f"a {self._kind} named '{name}' is already registered; choose another name, or pass replace=True"
            raise ConfigError(msg)
        self._check_entry(name, entry)
        self._entries[name] = entry
        self._failures.pop(name, None)
        self._origins.pop(name, None)
        self._read_points().pop(name, None)

    def unregister(self, name: str) -> None:
        """Remove an entry; raises for a name without one.

        Examples
        --------
        >>> from groundscope.core.registry import Registry
        >>> shapes = Registry("shape", {"circle": 0, "square": 4})
        >>> shapes.unregister("square")
        >>> list(shapes)
        ['circle']
        """
        self[name]
        del self._entries[name]
        self._origins.pop(name, None)

    def usable(self) -> dict[str, T]:
        """Return the entries that can be loaded, by name; entries that cannot are in `failures`, and are logged."""
        entries: dict[str, T] = {}
        for name in list(self):
            with contextlib.suppress(self._error):
                entries[name] = self[name]
        return entries

    @property
    def failures(self) -> Mapping[str, str]:
        """Entries of installed packages that failed to load: distribution and error by name."""
        return MappingProxyType(self._failures)

    @property
    def origins(self) -> Mapping[str, str]:
        """Entries loaded from installed packages: ``distribution version`` by name, for provenance."""
        return MappingProxyType(self._origins)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries and name in self._read_points():
            self._load(name)
        if name in self._entries:
            return self._entries[name]
        if name in self._failures:
            msg = f"the {self._kind} '{name}' cannot be used: {self._failures[name]}"
            raise self._error(msg)
        names = list(self)
        msg = f"unknown {self._kind} '{name}'; choose from {', '.join(names)}{nearest(str(name), names)}"
        raise self._error(msg)

    def get(self, name: str, default: T | None = None) -> T | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the entry, or `default` for an unknown name; raise for an entry that cannot be loaded."""
        return self[name] if name in self else default  # noqa: SIM401 - this is get

    def __contains__(self, name: object) -> bool:
        return name in self._entries or (isinstance(name, str) and name in self._read_points())

    def __iter__(self) -> Iterator[str]:
        return iter([*self._entries, *self._read_points()])

    def __len__(self) -> int:
        return len(self._entries) + len(self._read_points())

    def _read_points(self) -> dict[str, EntryPoint]:
        """Return the entry points that are not yet loaded; installed packages do not replace built-in names."""
        if self._points is None:
            self._points = {}
            for point in entry_points(group=self._group) if self._group else ():
                if point.name in self._entries or point.name in self._points:
                    _LOG.warning(
                        "%s: the %s '%s' is ignored, the name is in use", _distribution(point), self._kind, point.name
                    )
                else:
                    self._points[point.name] = point
        return self._points

    def _load(self, name: str) -> None:
        """Import the entry of an installed package; a failure is recorded and does not affect other entries."""
        point = self._read_points().pop(name)
        try:
            entry = point.load()
            self._check_entry(name, entry)
        except Exception as error:  # noqa: BLE001 - a failing package must not affect others
            self._failures[name] = f"{_distribution(point)} ({point.value}): {type(error).__name__}: {error}"
            _LOG.warning("the %s '%s' was not loaded: %s", self._kind, name, self._failures[name])
            return
        self._entries[name] = entry
        self._origins[name] = _distribution(point)

    def _check_entry(self, name: str, entry: T) -> None:
        if self._check is not None and (problem := self._check(entry)) is not None:
            msg = f"the {self._kind} '{name}' is invalid: {problem}"
            raise ConfigError(msg)


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
