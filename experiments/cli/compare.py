"""``groundscope compare runs/a runs/b``: what two runs found, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.results.headlines import Headline, headlines
from experiments.text import plain_console
from groundscope.core.errors import ConfigError, GroundscopeError


def show(arguments: Sequence[str]) -> int:
    """Print the figures of two runs and how they differ, then what changed question by question.

    Parameters
    ----------
    arguments
        Two runs, and optionally under which condition each answered (one for both): ``before``, ``after``, …

    Raises
    ------
    ConfigError
        Where two runs are not given, or one has finished no stage.
    """
    from rich.table import Table
    from rich.text import Text

    if not 2 <= len(arguments) <= 4:
        msg = f"groundscope compare takes two runs, runs/a runs/b; it was given {len(arguments)} arguments"
        raise ConfigError(msg)
    runs, conditions = arguments[:2], (list(arguments[2:]) or ["before"]) * 2
    first, second = (_figures(Path(a)) for a in runs)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading, side in (
        ("figure", "left"),
        (arguments[0], "right"),
        (arguments[1], "right"),
        ("difference", "right"),
    ):
        table.add_column(Text(heading), justify=side, overflow="fold")  # pyright: ignore[reportArgumentType]
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        moved = f"{b.value - a.value:+.4g}" if a and b else ""
        table.add_row(Text(name), _cell(a), _cell(b), moved)
    console = plain_console()
    console.print(table)
    console.print(_paired(runs, conditions), markup=False)
    return 0


def _paired(runs: Sequence[str], conditions: Sequence[str]) -> str:
    """Say what changed question by question, where both runs have answers to the same questions."""
    from experiments.results.comparison import compare_runs

    try:
        return compare_runs(runs[0], runs[1], conditions=(conditions[0], conditions[1])).text()
    except GroundscopeError as error:
        return f"not compared question by question: {error}"


def _figures(run: Path) -> dict[str, Headline]:
    found = {f.name: f for f in headlines(run) if f.main}
    if not found:
        msg = f"'{run}' is no run with finished stages: groundscope status {run.parent} lists those there are"
        raise ConfigError(msg)
    return found


def _cell(figure: Headline | None) -> str:
    if figure is None:
        return ""
    ends = f" [{figure.low:.4g}, {figure.high:.4g}]" if figure.low is not None and figure.high is not None else ""
    return f"{figure.value:.4g}{ends}"
