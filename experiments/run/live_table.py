"""Progress of a run: a live table of its stages on a terminal, elsewhere one line per stage and one a minute within a stage.

The progress is also in a file of the run folder, for `groundscope status` in another terminal.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, Task
from rich.table import Table
from rich.text import Text

from experiments.config import STAGES
from experiments.terminal_text import printable
from groundscope.core.files import write_text
from groundscope.core.progress import watched

_STYLES = {"unchanged": "dim", "shared": "cyan", "failed": "bold red", "waiting": "dim"}
_REFRESH = 0.25
"""Seconds between two updates of the table."""
PROGRESS = ".progress.json"
"""File in the folder of a run with the progress of the process that is running it."""
LINE_EVERY = 60.0
"""Seconds between two lines about a stage, if the output is not a terminal."""
RECORD_EVERY = 5.0
"""Seconds between two updates of the file."""


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
    folder
        Folder of the run, in which a file has the progress; None for no file.
    """

    def __init__(self, stages: Sequence[str], console: Console | None = None, folder: Path | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._rows = {name: _Row() for name in STAGES if name in stages}
        self._stack = ExitStack()
        self._running = ""
        self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=1 / _REFRESH)
        self._record = None if folder is None else folder / PROGRESS
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self._stack.enter_context(watched(self._watch))
        if self.console.is_terminal:
            self._stack.enter_context(self._live)
        self._stack.callback(self._forget)
        thread = threading.Thread(target=self._report, daemon=True, name="progress")
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(self._end.set)
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
        self._rows[stage] = _Row("running", start=time.monotonic())
        self._running = stage

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

    def _report(self) -> None:
        """Print a line each minute if the output is not a terminal, and write the file every few seconds, until the end."""
        last = recorded = time.monotonic()
        step = min(LINE_EVERY, RECORD_EVERY, 1.0)
        while not self._end.wait(step):
            row = self._rows.get(self._running)
            if row is None or row.state != "running":
                continue
            now, text = time.monotonic(), _describe(row.progress)
            if not self.console.is_terminal and now - max(last, row.start) >= LINE_EVERY:
                last = now
                self.print(f"  {self._running:<9} {_clock(now - row.start):>9}  {text or 'running'}")
            if self._record is not None and now - recorded >= RECORD_EVERY:
                recorded = now
                with suppress(OSError):  # the disk may be full: the stage reports it
                    record = {"stage": self._running, "text": text, "seconds": now - row.start, "time": time.time()}
                    write_text(self._record, json.dumps(record))

    def _forget(self) -> None:
        if self._record is not None:
            with suppress(OSError):
                self._record.unlink(missing_ok=True)


def _describe(progress: Progress | None) -> str:
    """Return count, rate and remaining time: ``tracing 120 of 300, 41.2/s, 0:04 left``."""
    task = next((t for t in reversed(progress.tasks) if not t.finished), None) if progress is not None else None
    if task is None:
        return ""
    parts = [f"{task.description} {task.completed:.0f} of {task.total:.0f}" if task.total else task.description]
    speed = task.speed or _mean_speed(task)
    if speed:
        parts.append(f"{speed:.1f}/s" if speed >= 0.1 else f"{60 * speed:.1f}/min")
        if task.total:
            parts.append(f"{_clock((task.total - task.completed) / speed)} left")
    return ", ".join(parts)


def _mean_speed(task: Task) -> float | None:
    """Return the steps per second since the start: rich has no speed while no step ended within half a minute."""
    return task.completed / task.elapsed if task.elapsed and task.completed else None


def _clock(seconds: float) -> str:
    """Return a duration as ``0:04`` or ``2:03:04``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"
