"""Progress of whatever takes more than a second: a bar on a terminal, quiet elsewhere, or a row in somebody's table."""

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
    """Hand every display that is made inside to `watcher`, who draws it in a table of its own; it draws nothing itself."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def display(*columns: ProgressColumn, show: bool | None = None) -> Progress:
    """Return a display on standard error that vanishes when done.

    Parameters
    ----------
    columns
        What a line of it shows; rich's own choice by default.
    show
        By default on a terminal only; False for never.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    watcher = _WATCHER.get() if show is not False else None
    shown = watcher is None and (console.is_terminal if show is None else show)
    made = Progress(*columns, console=console, disable=not shown, transient=True)
    if watcher is not None:
        watcher(made)
    return made


def progress_bar(show: bool | None = None) -> Progress:
    """Return a display with rich's default columns; by default shown only on a terminal."""
    return display(show=show)
