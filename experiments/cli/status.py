"""``groundscope status runs/``: what runs there are, how far they came, how large they are, what they found."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config import STAGES
from experiments.records import FAILURE, read_record
from experiments.results.headlines import headlines
from experiments.run.folder import BEGUN, FAILED, MARKER, check_layout, read_receipt
from experiments.run.stage_cache import runs_in
from experiments.stages.table import TABLE
from experiments.text import plain_console, printable, size
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.locks import holder, is_locked
from groundscope.core.paths import files_below, is_file

_TOLD = ("all: right", "neutral: right", "conflict: wrong by prior", "adversarial absent: says yes")
"""Measures that are told of a run, where it has them."""
_MARKS = {"done": "●", "failed": "✗", "begun": "◐", "missing": "·"}


@dataclass(frozen=True)
class RunStatus:
    """How far a run came."""

    path: Path
    stages: dict[str, str]
    """Stage to ``done``, ``failed``, ``begun`` (and not finished) or ``missing``."""
    at_work: str
    """Who works in it now, empty for nobody."""
    bytes: int
    """Sizes of its files, those it shares with other runs too."""
    figures: tuple[str, ...]
    errors: tuple[str, ...]


def status(run: Path) -> RunStatus:
    """Return how far a run came; what cannot be read in it is among its errors."""
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
    at_work = holder(run / ".lock") if is_locked(run / ".lock") else ""
    try:
        check_layout(run)
        figures = tuple(_figures(run))
    except GroundscopeError as damage:
        figures = ()
        if str(damage).splitlines()[0] not in " ".join(errors):
            errors.append(str(damage).splitlines()[0])
    return RunStatus(run, stages, at_work, count, figures, tuple(errors))


def _state(folder: Path) -> tuple[str, str]:
    """Return the state of a stage, and the error that it ended in."""
    if read_receipt(folder) is not None:
        return "done", ""
    if is_file(folder / FAILED):
        return "failed", read_record(folder / FAILED, FAILURE)["error"]
    return ("begun" if is_file(folder / BEGUN) else "missing"), ""


def _figures(run: Path) -> list[str]:
    found = {f.measure: f.value for f in headlines(run, quick=True) if f.stage == "evaluate"}
    told = []
    for name in _TOLD:
        before, after = found.get(f"{name}, before"), found.get(f"{name}, after")
        if before is not None and (name != "all: right" or "neutral: right, before" not in found):
            told.append(f"{name} {100 * before:.1f}" + (f" → {100 * after:.1f} %" if after is not None else " %"))
    return told


def show(arguments: Sequence[str]) -> int:
    """Print the table of a folder of runs, or of one run.

    Raises
    ------
    ConfigError
        Where there is no run.
    """
    from rich.table import Table
    from rich.text import Text

    root = Path(arguments[0] if arguments else "runs")
    runs = [root] if is_file(root / MARKER) else list(runs_in(root))
    if len(arguments) > 1 or not runs:
        msg = f"no runs in '{root}': groundscope status FOLDER takes a folder of runs, or a run" + (
            f"; it was given {len(arguments)} arguments" if len(arguments) > 1 else ""
        )
        raise ConfigError(msg)
    console = plain_console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for name in STAGES:
        table.add_column(name, justify="center", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("found", overflow="fold")
    for found in map(status, runs):
        name = str(found.path.relative_to(root)) if found.path != root else str(root)
        said = [*found.figures, *found.errors, *([f"at work: {found.at_work}"] if found.at_work else [])]
        marks = [Text(_MARKS[s], _style(s)) for s in found.stages.values()]
        table.add_row(Text(printable(name)), *marks, size(found.bytes), Text(printable("\n".join(said))))
    console.print(table)
    console.print(", ".join(f"{mark} {state}" for state, mark in _MARKS.items()))
    once = {(s.st_dev, s.st_ino): s.st_size for _, s in files_below(root) if stat.S_ISREG(s.st_mode)}
    console.print(f"{len(runs)} runs, {size(sum(once.values()))} on the disk: stages that runs share lie there once")
    return 0


def _style(state: str) -> str:
    return {"done": "green", "failed": "red", "begun": "yellow"}.get(state, "dim")
