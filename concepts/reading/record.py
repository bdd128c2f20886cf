"""One JSON object or table row of a file: typed access to its fields, with the file and line in every error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from groundscope.core.errors import DataError
from groundscope.core.text import nearest

LARGEST_INTEGER = 1 << 53
"""Whole numbers up to this size are exact as floats."""


@dataclass(frozen=True)
class Record:
    """One object of a file.

    Examples
    --------
    >>> from concepts.reading.record import Record
    >>> record = Record("questions.jsonl: line 3", {"id": 17, "image": "a.png", "box": [1, 2]})
    >>> record.text("image"), record.identifier("id"), record.list("box")
    ('a.png', '17', [1, 2])
    >>> record.text("id")
    Traceback (most recent call last):
    groundscope.core.errors.DataError: questions.jsonl: line 3: field 'id' must hold text, not 17
    """

    where: str
    """File, and line or index of the record, for error messages."""
    values: dict[str, Any]
    """Fields by name."""
    table: bool = False
    """Whether it is a row of a table, whose cells are text or None."""

    def field(self, *names: str) -> Any:
        """Return the first of these fields that is present; raises `DataError` if none is."""
        for name in names:
            if name in self.values:
                return self.values[name]
        expected = " or ".join(f"'{n}'" for n in names)
        present = ", ".join(map(repr, self.values)) or "no fields"
        msg = f"{self.where}: no field {expected}; it has {present}{nearest(names[0], self.values)}"
        raise DataError(msg)

    def text(self, *names: str) -> str:
        """Return a field that holds text; raises `DataError` for blank text and other values."""
        value = self.field(*names)
        if not is_text(value) or not value.strip():
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold text, not {abbreviate(value)}"
            raise DataError(msg)
        return value

    def numbers(self, *names: str) -> tuple[float, ...]:
        """Return fields that each hold a finite number; raises `DataError` for other values.

        Whole numbers above 2**53 are refused, because they are not exact as floats.
        """
        numbers = []
        for name in names:
            value = self.field(name)
            if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                msg = (
                    f"{self.where}: field '{name}' must not exceed 2**53; larger whole numbers are not exact as floats"
                )
                raise DataError(msg)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                msg = f"{self.where}: field '{name}' must hold a number, not {abbreviate(value)}"
                raise DataError(msg)
            numbers.append(float(value))
        return tuple(numbers)

    def list(self, *names: str) -> list[Any]:
        """Return a field that holds a list; raises `DataError` for other values."""
        value = self.field(*names)
        if not isinstance(value, list):
            msg = f"{self.where}: field {' or '.join(map(repr, names))} must hold a list, not {abbreviate(value)}"
            raise DataError(msg)
        return value

    def records(self, *names: str) -> Iterator[Record]:
        """Yield the objects of a field that holds a list of objects, each with its place in the file."""
        for number, value in enumerate(self.list(*names), 1):
            yield as_record(f"{self.where}, {names[0]} {number}", value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """Return a field that holds a list of texts; raises `DataError` for other values, and for blank texts."""
        values = self.list(*names)
        if not all(is_text(value) and value.strip() for value in values):
            expected = " or ".join(map(repr, names))
            msg = f"{self.where}: field {expected} must hold a list of texts, not {abbreviate(values)}"
            raise DataError(msg)
        return tuple(values)

    def identifier(self, *names: str) -> str:
        """Return a field that holds text or a whole number, as text; raises `DataError` for other values."""
        value = self.field(*names)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(*names)


def as_record(where: str, value: Any) -> Record:
    """Return a JSON object as a record; raises `DataError` for other values."""
    if not isinstance(value, dict):
        msg = f"{where}: expected a JSON object with fields, found {abbreviate(value)}"
        raise DataError(msg)
    return Record(where, value)


def is_text(value: object) -> TypeGuard[str]:
    r"""Whether a value is text that can be encoded as UTF-8, which a lone surrogate such as JSON's ``\ud800`` cannot."""
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
