"""One JSON object or table row of a file: typed access to its fields, with the file and line in every error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from groundscope.core.errors import DataError

LARGEST_INTEGER = 1 << 53
"""Whole numbers up to this size are exact as floats."""


@dataclass(frozen=True)
class Record:
    """One object of a file."""

    where: str
    """File, and line or place in the array, for people."""
    values: dict[str, Any]
    table: bool = False
    """Whether it is a row of a table, whose cells are text or None."""

    def field(self, *names: str) -> Any:
        """Return the first of these fields that is there; raises `DataError` where none is."""
        for name in names:
            if name in self.values:
                return self.values[name]
        wanted = " or ".join(f"'{n}'" for n in names)
        msg = f"{self.where}: no field {wanted}; it has {', '.join(map(repr, self.values)) or 'none'}"
        raise DataError(msg)

    def text(self, *names: str) -> str:
        """Return a field that holds words; raises `DataError` where it holds anything else or nothing."""
        value = self.field(*names)
        if not is_text(value) or not value.strip():
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold words, not {abbreviate(value)}"
            raise DataError(msg)
        return value

    def numbers(self, *names: str) -> tuple[float, ...]:
        """Return fields that each hold a finite number; raises `DataError` where one holds anything else.

        A whole number beyond 2**53 is refused, because a float would hold another one.
        """
        found = []
        for name in names:
            value = self.field(name)
            if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                msg = f"{self.where}: field '{name}': a whole number beyond 2**53 cannot be kept exactly"
                raise DataError(msg)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                msg = f"{self.where}: field '{name}' must hold a number, not {abbreviate(value)}"
                raise DataError(msg)
            found.append(float(value))
        return tuple(found)

    def list(self, *names: str) -> list[Any]:
        """Return a field that holds a list; raises `DataError` where it holds anything else."""
        value = self.field(*names)
        if not isinstance(value, list):
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold a list, not {abbreviate(value)}"
            raise DataError(msg)
        return value

    def records(self, *names: str) -> Iterator[Record]:
        """Yield the objects of a field that holds a list of them, each with its place."""
        for number, value in enumerate(self.list(*names), 1):
            yield as_record(f"{self.where}, {names[0]} {number}", value)

    def words(self, *names: str) -> tuple[str, ...]:
        """Return a field that holds a list of texts; raises `DataError` where it holds anything else."""
        value = self.list(*names)
        if not all(is_text(word) and word.strip() for word in value):
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold words, not {abbreviate(value)}"
            raise DataError(msg)
        return tuple(value)

    def identifier(self, *names: str) -> str:
        """Return a field that holds a name or a whole number, as text; raises `DataError` for anything else."""
        value = self.field(*names)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(*names)


def as_record(where: str, value: Any) -> Record:
    """Return a JSON object as a record; raises `DataError` for anything else."""
    if not isinstance(value, dict):
        msg = f"{where}: expected a JSON object with fields, found {abbreviate(value)}"
        raise DataError(msg)
    return Record(where, value)


def is_text(value: object) -> TypeGuard[str]:
    r"""Say whether a value is text that can be written as UTF-8; a ``\\ud800`` of JSON alone is half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def abbreviate(value: object) -> str:
    """Return a JSON value as text of at most 60 characters, for messages."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
