"""``groundscope status runs/``: what runs there are, how far they came, how large they are, what they found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config import STAGES
from experiments.results.headlines import headlines
from experiments.run.folder import FAILED, read_receipt
from experiments.run.stage_cache import runs_in
from experiments.stages.table import TABLE
from experiments.text import plain_console, size
from groundscope.core.errors import ConfigError
from groundscope.core.locks import holder, taken

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
    """Return how far a run came."""
    stages, errors = {}, []
    for name in STAGES:
        folder = run / TABLE[name].folder
        failed = folder / FAILED
        if read_receipt(folder) is not None:
            stages[name] = "done"
        elif failed.is_file():
            stages[name] = "failed"
            errors.append(f"{name}: {json.loads(failed.read_text())['error']}".splitlines()[0])
        else:
            stages[name] = "begun" if (folder / ".key").exists() else "missing"
    count = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    at_work = holder(run / ".lock") if taken(run / ".lock") else ""
    return RunStatus(run, stages, at_work, count, tuple(_figures(run)), tuple(errors))


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
    runs = [root] if (root / "run.json").is_file() else list(runs_in(root))
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
        table.add_row(Text(name), *marks, size(found.bytes), Text("\n".join(said)))
    console.print(table)
    console.print(", ".join(f"{mark} {state}" for state, mark in _MARKS.items()))
    once = {(p.stat().st_dev, p.stat().st_ino): p.stat().st_size for p in root.rglob("*") if p.is_file()}
    console.print(f"{len(runs)} runs, {size(sum(once.values()))} on the disk: stages that runs share lie there once")
    return 0


def _style(state: str) -> str:
    return {"done": "green", "failed": "red", "begun": "yellow"}.get(state, "dim")
