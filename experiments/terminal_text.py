"""Text for a terminal: sizes, escaped control characters, and a console for tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def size(count: float) -> str:
    """Return a number of bytes with its unit, such as ``31.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def printable(text: str) -> str:
    """Return text with control characters escaped, so that text from a file cannot control the terminal; keeps line ends."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plain_console() -> Console:
    """Return a console on standard output, as wide as the terminal, or 240 columns if it is not a terminal."""
    from rich.console import Console

    width = None if Console().is_terminal else 240
    return Console(highlight=False, width=width)
