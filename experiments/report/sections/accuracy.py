"""Accuracy of the answers, by condition and kind of question."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from behavior.benchmark_table import FIGURES
from experiments.report import figures
from experiments.report.figures import Point
from experiments.report.html import closed, figure, paragraph, section, table
from experiments.results.run_files import RunFiles
from experiments.results.score_tables import score_tables
from groundscope.core.statistics import Estimate

if TYPE_CHECKING:
    from behavior import BenchmarkTable

CONDITIONS: Mapping[str, str] = {
    "before": "not steered",
    "after": "steered",
    "exportable": "steered, exportable vector",
    "random direction": "control: random direction",
    "shuffled labels": "control: shuffled labels",
    "moved to other heads": "control: same directions, other heads",
    "derived at other heads": "control: same derivation, other heads",
    "twin": "twin without the prior",
}
"""Condition to its label in figures and tables."""
ERRORS = (
    "conflict: wrong by prior",
    "adversarial absent: says yes",
    "popular absent: says yes",
    "random absent: says yes",
)
"""Measures of errors that a prior causes, the most important first."""


def accuracy_section(run: RunFiles) -> str:
    """Return the section."""
    series = {condition: run.rates[condition] for condition in ("before", "twin") if condition in run.rates}
    right = {c: points(rates, lambda name: "right" in name or "recall" in name) for c, rates in series.items()}
    wrong = {
        c: points(rates, lambda name: "says" in name or "wrong" in name or "CHAIR" in name)
        for c, rates in series.items()
    }
    parts = [
        paragraph(
            "Answers to the test questions. Their images were not used to fit, choose or derive anything. Error bars are 95 % "
            "intervals from a bootstrap over images."
        ),
        figure(figures.rates(right, CONDITIONS, "Right answers"), "Share of right answers by split; higher is better."),
    ]
    if next(iter(wrong.values())):
        parts.append(
            figure(figures.rates(wrong, CONDITIONS, "Errors"), "Share of errors by kind of question; lower is better.")
        )
    for condition, answers in score_tables(run.root).items():
        label = CONDITIONS[condition]
        parts.append(
            closed(f"scores-{condition}", f"Table by data set and split: {label}", table(*_table(answers)))
            if condition != "before"
            else paragraph(f"By data set and split, {label}, in percent, with 95 % intervals:")
            + table(*_table(answers))
        )
    return section("accuracy", "What the model says", *parts, stages=("evaluate",))


def _table(answers: BenchmarkTable) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table that papers print, with intervals."""
    head, *_ = answers.cells()
    with_form = "form" in head
    rows = []
    for row in answers.rows:
        cells = [_cell(row.figures.get(name)) for name in FIGURES]
        rows.append([row.data, row.split, *([row.form] if with_form else []), str(row.n), *cells, str(row.unparsed)])
    return head, rows


def _cell(figure: Estimate | None) -> str:
    if figure is None or math.isnan(figure.value):
        return ""
    ends = "" if math.isnan(figure.low) else f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    return f"{100 * figure.value:.1f}{ends}"


def points(rates: Mapping[str, Estimate], include: Callable[[str], bool]) -> dict[str, Point]:
    """Return the estimates of some measures as points of a figure."""
    return {name: Point(e.value, e.low, e.high, e.n) for name, e in rates.items() if include(name)}
