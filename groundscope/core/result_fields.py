"""Fields of result files: check their types, and convert what goes wrong while a result is built into one error.

A file may be edited, written by another program, or damaged in a way that its digest does not show. Each loader checks the
fields of its card by the type hints of the class it builds, and builds within `building`.
"""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from groundscope.core.errors import GroundscopeError

_UNEXPECTED = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What constructors raise for a field of a wrong type or size."""
_NAMES = {str: "text", bool: "true or false", int: "an integer", float: "a number", types.NoneType: "null"}


@contextlib.contextmanager
def building(problem: str, error: type[GroundscopeError], advice: str = "") -> Iterator[None]:
    """Convert an exception while a result is built from a file into an `error`.

    Parameters
    ----------
    problem
        Start of the message, with the file: ``x.json is a damaged graph file``.
    error
        The class of the exception.
    advice
        End of the message.

    Raises
    ------
    GroundscopeError
        An `error` with the problem, the reason and the advice.
    """
    try:
        yield
    except _UNEXPECTED as reason:
        text = f"{reason} is missing" if isinstance(reason, KeyError) else str(reason) or type(reason).__name__
        msg = f"{problem}: {text}{advice}"
        raise error(msg) from reason


def check_fields(values: Any, kind: type, at: str = "") -> dict[str, Any]:
    """Return the fields of a stored object after a check of their types by the type hints of a dataclass.

    Parameters
    ----------
    values
        The object as JSON has it: a ``tuple`` of the class is a list, a ``Mapping`` is an object.
    kind
        The dataclass. Fields with other hints, such as arrays, and missing fields are not checked.
    at
        Name of the object in the file, for the message.

    Raises
    ------
    TypeError
        Names the first field of a wrong type; to be converted by `building`.
    """
    if not isinstance(values, dict):
        name = f"'{at}'" if at else "its content"
        msg = f"{name} must be an object, not {_type_of(values)}"
        raise TypeError(msg)
    hints = _hints(kind)
    for name, value in values.items():
        hint = hints.get(name, Any)
        if not _matches(value, hint):
            field = f"{at}.{name}" if at else name
            actual = (
                "a list or object with an element of a wrong type" if _right_outside(value, hint) else _type_of(value)
            )
            msg = f"'{field}' must be {_describe(hint)}, not {actual}"
            raise TypeError(msg)
    return values


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _matches(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_matches(item, inner[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_matches(item, inner[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint not in (str, bool, types.NoneType) or isinstance(value, hint)


def _right_outside(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return (origin is tuple and isinstance(value, list | tuple)) or (origin is Mapping and isinstance(value, Mapping))


def _describe(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in inner)
    if origin is tuple:
        return f"a list, each element {_describe(inner[0])}"
    if origin is Mapping:
        return "an object" if inner[1] is Any else f"an object, each value {_describe(inner[1])}"
    return _NAMES.get(hint, "an object")


def _type_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else _NAMES.get(type(value), type(value).__name__)
