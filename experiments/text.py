"""Text for people: sizes, a console for tables, and text from files without a terminal's control codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def size(count: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def printable(text: str) -> str:
    """Return text with control characters as escapes, so that text of a file cannot drive a terminal; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plain_console() -> Console:
    """Return standard output for tables: as wide as the terminal, and wide enough for programs that read it."""
    from rich.console import Console

    width = None if Console().is_terminal else 240
    return Console(highlight=False, width=width)
