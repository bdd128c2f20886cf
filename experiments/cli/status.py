"""``groundscope status runs/``: the runs in a folder, with the state of their stages, their sizes and main results."""

from __future__ import annotations

import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config import STAGES
from experiments.records import FAILURE, NUMBER, TEXT, read_record
from experiments.results.headlines import headlines
from experiments.run.folder import FAILED, MARKER, STARTED, check_layout, read_receipt
from experiments.run.live_table import PROGRESS, RECORD_EVERY
from experiments.run.stage_cache import runs_in
from experiments.stages.registry import TABLE
from experiments.terminal_text import plain_console, printable, size
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.locks import holder, is_locked
from groundscope.core.paths import files_below, is_file
from groundscope.core.text import format_count

_MEASURES = ("all: right", "neutral: right", "conflict: wrong by prior", "adversarial absent: says yes")
"""Measures in the table, if a run has them."""
_MARKS = {"done": "●", "failed": "✗", "started": "◐", "missing": "·"}


@dataclass(frozen=True)
class RunStatus:
    """State of a run."""

    path: Path
    stages: dict[str, str]
    """Stage to ``done``, ``failed``, ``started`` (not finished) or ``missing``."""
    process: str
    """The process that is running it now, with its progress; empty if no process runs it."""
    bytes: int
    """Size of its files, including those that other runs share."""
    figures: tuple[str, ...]
    """Main results."""
    errors: tuple[str, ...]


def status(run: Path) -> RunStatus:
    """Return the state of a run; files that cannot be read are among its errors."""
    stages, errors = {}, []
    for name in STAGES:
        folder = run / TABLE[name].folder
        try:
            stages[name], error = _state(folder)
        except ConfigError as damage:
            stages[name], error = "failed", str(damage)
        if error:
            errors.append(f"{name}: {error}".splitlines()[0])
    count = sum(about.st_size for _, about in files_below(run) if stat.S_ISREG(about.st_mode))
    process = ""
    if is_locked(run / ".lock"):
        process = ", ".join([holder(run / ".lock"), *_progress(run)])
    try:
        check_layout(run)
        figures = tuple(_figures(run))
    except GroundscopeError as damage:
        figures = ()
        if str(damage).splitlines()[0] not in " ".join(errors):
            errors.append(str(damage).splitlines()[0])
    return RunStatus(run, stages, process, count, figures, tuple(errors))


def _state(folder: Path) -> tuple[str, str]:
    """Return the state of a stage, and its error if it failed."""
    if read_receipt(folder) is not None:
        return "done", ""
    if is_file(folder / FAILED):
        return "failed", read_record(folder / FAILED, FAILURE)["error"]
    return ("started" if is_file(folder / STARTED) else "missing"), ""


def _progress(run: Path) -> list[str]:
    """Return stage, counts, rate and remaining time of the process that is running a run, as it last wrote them."""
    if not is_file(run / PROGRESS):
        return []
    try:
        record = read_record(
            run / PROGRESS, {"stage": TEXT, "text": TEXT, "seconds": NUMBER, "time": NUMBER}, limit=1 << 12
        )
    except ConfigError:  # replaced while it was read, or damaged
        return []
    age = max(0.0, time.time() - record["time"])
    when = f" ({age:.0f} s ago)" if age > 2 * RECORD_EVERY else ""
    return [f"{record['stage']} for {record['seconds']:.0f} s: {record['text'] or 'no counts yet'}{when}"]


def _figures(run: Path) -> list[str]:
    values = {h.measure: h.value for h in headlines(run, quick=True) if h.stage == "evaluate"}
    figures = []
    for name in _MEASURES:
        before, after = values.get(f"{name}, before"), values.get(f"{name}, after")
        if before is not None and (name != "all: right" or "neutral: right, before" not in values):
            figures.append(f"{name} {100 * before:.1f}" + (f" → {100 * after:.1f} %" if after is not None else " %"))
    return figures


def show(arguments: Sequence[str]) -> int:
    """Print the runs in a folder, or one run, as a table.

    Raises
    ------
    ConfigError
        If there is no run.
    """
    from rich.table import Table
    from rich.text import Text

    root = Path(arguments[0] if arguments else "runs")
    runs = [root] if is_file(root / MARKER) else list(runs_in(root))
    if len(arguments) > 1 or not runs:
        msg = f"no runs in '{root}': groundscope status FOLDER takes a folder of runs, or a run" + (
            f"; it received {format_count(len(arguments), 'argument')}" if len(arguments) > 1 else ""
        )
        raise ConfigError(msg)
    console = plain_console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for name in STAGES:
        table.add_column(name, justify="center", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("results", overflow="fold")
    for state in map(status, runs):
        name = str(state.path.relative_to(root)) if state.path != root else str(root)
        notes = [*state.figures, *state.errors, *([f"running: {state.process}"] if state.process else [])]
        marks = [Text(_MARKS[s], _style(s)) for s in state.stages.values()]
        table.add_row(Text(printable(name)), *marks, size(state.bytes), Text(printable("\n".join(notes))))
    console.print(table)
    console.print(", ".join(f"{mark} {state}" for state, mark in _MARKS.items()))
    files = {(s.st_dev, s.st_ino): s.st_size for _, s in files_below(root) if stat.S_ISREG(s.st_mode)}
    console.print(
        f"{format_count(len(runs), 'run')}, {size(sum(files.values()))} on the disk; files that runs share are counted once"
    )
    return 0


def _style(state: str) -> str:
    return {"done": "green", "failed": "red", "started": "yellow"}.get(state, "dim")
