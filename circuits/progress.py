"""Progress on standard error: shown where that is a terminal, quiet elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def progress_bar(show: bool | None = None) -> Progress:
    """Return a progress display that vanishes when done; by default shown only on a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal if show is None else show
    return Progress(console=console, disable=not shown, transient=True)
