"""Accuracy of the answers, by condition and kind of question."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.report import figures
from experiments.report.figures import Point
from experiments.report.html import figure, paragraph, section
from experiments.results.run_files import RunFiles
from groundscope.core.statistics import Estimate

CONDITIONS: Mapping[str, str] = {
    "before": "not steered",
    "after": "steered",
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
    return section("accuracy", "What the model says", *parts, stages=("evaluate",))


def points(rates: Mapping[str, Estimate], include: Callable[[str], bool]) -> dict[str, Point]:
    """Return the estimates of some measures as points of a figure."""
    return {name: Point(e.value, e.low, e.high, e.n) for name, e in rates.items() if include(name)}
