"""What a run shows of itself: one live table of its stages on a terminal, a line a stage elsewhere."""

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
from experiments.text import printable
from groundscope.core.progress import watched

_STYLES = {"unchanged": "dim", "shared": "cyan", "failed": "bold red", "waits": "dim"}
_WHILE = 0.25
"""Seconds between two drawings."""


@dataclass
class _Row:
    state: str = "waits"
    told: str = ""
    since: float = 0.0
    work: Progress | None = None
    """What the stage's work shows of itself, drawn here instead."""


class Board:
    """The stages of a run and how far they are.

    Parameters
    ----------
    stages
        Those that will run.
    console
        Where it is shown; by default standard output. What is not a terminal gets plain lines.
    """

    def __init__(self, stages: Sequence[str], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._rows = {name: _Row() for name in STAGES if name in stages}
        self._stack = ExitStack()
        self._running = ""
        self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=1 / _WHILE)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._stack.enter_context(watched(self._watch))
            self._stack.enter_context(self._live)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def say(self, text: str, bold: str = "") -> None:
        """Say a line, above the table where there is one; `bold` is a word of it."""
        line = Text(printable(text))
        if bold:
            line.highlight_words([bold], "bold")
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    def begin(self, stage: str) -> None:
        """Show a stage at work from now on."""
        self._running = stage
        self._rows[stage] = _Row("works", since=time.monotonic())

    def done(self, stage: str, state: str, told: str) -> None:
        """Show how a stage is finished, and what it says of itself."""
        self._rows[stage] = _Row(state, printable(told))
        if not self.console.is_terminal:
            self.say(f"  {stage:<9} {state:>9}  {told}")

    def failed(self, stage: str) -> None:
        """Show that a stage ended in an error, which somebody else tells."""
        self._rows[stage] = _Row("failed")

    def table(self) -> Table:
        """Return the table as it is now: stage, state, how far, how fast, how long still."""
        table = Table(box=None, padding=(0, 1), show_header=False)
        for name, row in self._rows.items():
            state = row.state if row.state != "works" else f"{time.monotonic() - row.since:.0f} s"
            told = row.told if row.state != "works" else _pace(row.work)
            table.add_row(name, Text(state, _STYLES.get(row.state, "green")), Text(told, overflow="fold"))
        return table

    def _watch(self, work: Progress) -> None:
        if self._running in self._rows:
            self._rows[self._running].work = work


def _pace(work: Progress | None) -> str:
    """Say how far work is, its rate and the time left: ``tracing 120 of 300, 41.2/s, 0:04 left``."""
    task = next((t for t in reversed(work.tasks) if not t.finished), None) if work is not None else None
    if task is None:
        return ""
    parts = [f"{task.description} {task.completed:.0f} of {task.total:.0f}" if task.total else task.description]
    if task.speed:
        parts.append(f"{task.speed:.1f}/s")
    if task.time_remaining is not None:
        minutes, seconds = divmod(int(task.time_remaining), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(parts)
