"""Progress of a run: a live table of its stages on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from experiments.config import STAGES
from experiments.terminal_text import printable
from groundscope.core.progress import watched

_STYLES = {"unchanged": "dim", "shared": "cyan", "failed": "bold red", "waiting": "dim"}
_REFRESH = 0.25
"""Seconds between two updates."""


@dataclass
class _Row:
    state: str = "waiting"
    summary: str = ""
    start: float = 0.0
    progress: Progress | None = None
    """Progress of the work of the stage, shown in its row."""


class LiveTable:
    """The stages of a run and their state.

    Parameters
    ----------
    stages
        The stages that run.
    console
        Where to show the table; by default standard output. Output that is not a terminal receives plain lines.
    """

    def __init__(self, stages: Sequence[str], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._rows = {name: _Row() for name in STAGES if name in stages}
        self._stack = ExitStack()
        self._running = ""
        self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=1 / _REFRESH)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._stack.enter_context(watched(self._watch))
            self._stack.enter_context(self._live)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def print(self, text: str, bold: str = "") -> None:
        """Print a line, above the table on a terminal; `bold` is a word of it."""
        line = Text(printable(text))
        if bold:
            line.highlight_words([bold], "bold")
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    def start(self, stage: str) -> None:
        """Show that a stage is running."""
        self._running = stage
        self._rows[stage] = _Row("running", start=time.monotonic())

    def finish(self, stage: str, state: str, summary: str) -> None:
        """Show the state and the summary of a finished stage."""
        self._rows[stage] = _Row(state, printable(summary))
        if not self.console.is_terminal:
            self.print(f"  {stage:<9} {state:>9}  {summary}")

    def fail(self, stage: str) -> None:
        """Show that a stage failed; the caller prints the error."""
        self._rows[stage] = _Row("failed")

    def table(self) -> Table:
        """Return the table: stage, state, progress, rate, and remaining time."""
        table = Table(box=None, padding=(0, 1), show_header=False)
        for name, row in self._rows.items():
            running = row.state == "running"
            state = f"{time.monotonic() - row.start:.0f} s" if running else row.state
            summary = _describe(row.progress) if running else row.summary
            table.add_row(name, Text(state, _STYLES.get(row.state, "green")), Text(summary, overflow="fold"))
        return table

    def _watch(self, progress: Progress) -> None:
        if self._running in self._rows:
            self._rows[self._running].progress = progress


def _describe(progress: Progress | None) -> str:
    """Return count, rate and remaining time: ``tracing 120 of 300, 41.2/s, 0:04 left``."""
    task = next((t for t in reversed(progress.tasks) if not t.finished), None) if progress is not None else None
    if task is None:
        return ""
    parts = [f"{task.description} {task.completed:.0f} of {task.total:.0f}" if task.total else task.description]
    if task.speed:
        parts.append(f"{task.speed:.1f}/s")
    if task.time_remaining is not None:
        minutes, seconds = divmod(int(task.time_remaining), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(parts)
