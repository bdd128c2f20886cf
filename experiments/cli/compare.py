"""``groundscope compare runs/a runs/b``: the results of two runs, side by side; ``page=FILE`` also writes what changed inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.results.headlines import Headline, headlines
from experiments.terminal_text import plain_console
from groundscope.core.errors import ConfigError, GroundscopeError

if TYPE_CHECKING:
    from diagnosis import ModelComparison
from groundscope.core.text import format_count


def show(arguments: Sequence[str]) -> int:
    """Print the main results of two runs with their differences, then the paired comparison of their answers.

    Parameters
    ----------
    arguments
        Two runs, and optionally the condition of each (or one for both): ``before``, ``after``, …; or a comparison that
        `diagnosis.ModelComparison.save` wrote. ``page=FILE`` writes the paired comparison as an HTML page too.

    Raises
    ------
    ConfigError
        For another number of arguments, or a run without a finished stage.
    """
    from rich.table import Table
    from rich.text import Text

    pages = [a.partition("=")[2] for a in arguments if a.startswith("page=")]
    arguments = [a for a in arguments if not a.startswith("page=")]
    if len(pages) > 1 or "" in pages:
        msg = "page= takes one file, such as page=changes.html"
        raise ConfigError(msg)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        from diagnosis import ModelComparison

        comparison = ModelComparison.load(arguments[0])
        plain_console().print(comparison.text(), markup=False)
        _write_page(comparison, pages)
        return 0
    if not 2 <= len(arguments) <= 4:
        msg = f"groundscope compare takes two runs, such as runs/a runs/b; it received {format_count(len(arguments), 'argument')}"
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
        difference = f"{b.value - a.value:+.4g}" if a and b else ""
        table.add_row(Text(name), _cell(a), _cell(b), difference)
    console = plain_console()
    console.print(table)
    from experiments.results.comparison import compare_runs

    try:
        comparison = compare_runs(runs[0], runs[1], conditions=(conditions[0], conditions[1]))
    except GroundscopeError as error:
        if pages:
            raise
        console.print(f"not compared question by question: {error}", markup=False)
        return 0
    console.print(comparison.text(), markup=False)
    _write_page(comparison, pages)
    return 0


def _write_page(comparison: ModelComparison, pages: Sequence[str]) -> None:
    if pages:
        from experiments.report.changes import write_changes

        write_changes(comparison, Path(pages[0]))
        plain_console().print(f"page: {pages[0]}", markup=False)


def _figures(run: Path) -> dict[str, Headline]:
    figures = {f.name: f for f in headlines(run) if f.main}
    if not figures:
        msg = f"'{run}' is not a run with finished stages; groundscope status {run.parent} lists the runs"
        raise ConfigError(msg)
    return figures


def _cell(figure: Headline | None) -> str:
    if figure is None:
        return ""
    ends = f" [{figure.low:.4g}, {figure.high:.4g}]" if figure.low is not None and figure.high is not None else ""
    return f"{figure.value:.4g}{ends}"
