"""Words for people: what somebody may have meant, and sizes."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the nearest of the known words, or nothing where none is near."""
    names = list(known)
    found = get_close_matches(word, names, n=3, cutoff=0.6)
    # People write the option without what it belongs to: folds for probe.folds.
    found += [n for n in names if n.rpartition(".")[2] == word.rpartition(".")[2] and n not in found]
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def size(count: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plain_console() -> Console:
    """Return standard output for tables: as wide as the terminal, and wide enough for programs that read it."""
    from rich.console import Console

    width = None if Console().is_terminal else 240
    return Console(highlight=False, width=width)
