"""Attention functions that are replaced for a while, and the implementation that each of them calls."""

from __future__ import annotations

from typing import Protocol


class Replacement(Protocol):
    """A replaced attention function."""

    usual: str
    """Name of the implementation that it calls."""


_REPLACEMENTS: dict[str, Replacement] = {}


def add_replacement(name: str, replacement: Replacement) -> None:
    """State that the implementation `name` of transformers' configurations is a replacement."""
    _REPLACEMENTS[name] = replacement


def remove_replacement(name: str) -> None:
    """Remove a replacement."""
    del _REPLACEMENTS[name]


def usual_name(implementation: str | None) -> str | None:
    """Return the implementation that a replacement calls, if `implementation` is the name of one; else `implementation`."""
    replacement = _REPLACEMENTS.get(str(implementation))
    return implementation if replacement is None else replacement.usual


def replace_usual(implementation: str | None, name: str) -> str:
    """Let a replacement, if `implementation` is the name of one, call `name`; return the name to configure."""
    replacement = _REPLACEMENTS.get(str(implementation))
    if replacement is None:
        return name
    replacement.usual = name
    return str(implementation)
