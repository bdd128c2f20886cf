"""Progress display of long operations: a bar on a terminal, nothing elsewhere, or a row in the caller's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

Watcher = Callable[["Progress"], None]
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Pass every display created in the context to `watcher`, which draws it; the display itself draws nothing."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def display(*columns: ProgressColumn, show: bool | None = None) -> Progress:
    """Return a transient progress display on standard error.

    Parameters
    ----------
    columns
        Columns of a line; rich's defaults if empty.
    show
        Whether to show the display; by default only on a terminal.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    watcher = _WATCHER.get() if show is not False else None
    visible = watcher is None and (console.is_terminal if show is None else show)
    progress = Progress(*columns, console=console, disable=not visible, transient=True)
    if watcher is not None:
        watcher(progress)
    return progress


def progress_bar(show: bool | None = None) -> Progress:
    """Return a display with rich's default columns; by default shown on a terminal only."""
    return display(show=show)
