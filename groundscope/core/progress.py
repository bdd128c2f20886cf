"""Progress display of long operations: a bar on a terminal, nothing elsewhere, or a row in the caller's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

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


class Advance(Protocol):
    """The function that advances a bar."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Add finished steps; print a non-empty note above the bar if the bar is shown."""
        ...


@contextmanager
def step_bar(label: str, total: int | None = None, *, done: int = 0, show: bool | None = None) -> Iterator[Advance]:
    """Show one bar with counts, speed and remaining time, and yield the function that advances it.

    Parameters
    ----------
    label
        Text before the bar.
    total
        Number of steps; None if unknown.
    done
        Steps finished before.
    show
        Whether to show the bar; by default only on a terminal.

    Examples
    --------
    >>> from groundscope.core.progress import step_bar
    >>> with step_bar("reading", total=3, show=False) as advance:
    ...     for _ in range(3):
    ...         advance()
    """
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f}/s" if speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with display(*columns, show=show) as bar:
        task = bar.add_task(label, total=total, completed=done)

        def advance(steps: int = 1, note: str = "") -> None:
            if note and not bar.disable:
                bar.console.print(note)
            bar.advance(task, steps)

        yield advance
