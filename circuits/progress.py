"""Progress on standard error: shown where that is a terminal, quiet elsewhere."""

from __future__ import annotations

from rich.progress import Progress

from concepts.progress import display


def progress_bar(show: bool | None = None) -> Progress:
    """Return a progress display that vanishes when done; by default shown only on a terminal."""
    return display(show=show)
