"""Effect and cost of the correction, with its controls."""

from __future__ import annotations

from experiments.report import figures
from experiments.report.html import figure, interval, paragraph, percent, section, table
from experiments.report.sections.accuracy import CONDITIONS, points
from experiments.results.run_files import RunFiles

CONTROLS = tuple(name for name, label in CONDITIONS.items() if label.startswith("control"))
_STYLES = {"before": "before", "after": "after"} | dict(
    zip(CONTROLS, ("control", "shuffled", "moved", "derived"), strict=True)
)
"""Condition to its style in `figures.rates`."""


def correction_section(run: RunFiles) -> str:
    """Return the section; empty if the model was not steered."""
    if "after" not in run.rates:
        return ""
    conditions = [c for c in _STYLES if c in run.rates]
    names = [n for n in run.rates["before"] if n != "all: right" or len(run.rates["before"]) < 4]
    series = {_STYLES[c]: points(run.rates[c], lambda name: name in names) for c in conditions}
    labels = {_STYLES[c]: CONDITIONS[c] for c in conditions}
    chosen = run.sweep["chosen"]
    files = [(name, file, "") for name, file in run.exports["written"].items()]
    files += [(name, "not written", reason) for name, reason in run.exports["refused"].items()]
    return section(
        "corrected",
        "What corrects it",
        paragraph(
            f"Method {run.sweep['method']} at heads {', '.join(run.top_heads)} with strength {chosen['strength']:g}, chosen "
            f"on the discovery images by this rule: {run.sweep['rule']}. The results below are on the test images."
        ),
        figure(
            figures.rates(series, labels, "Before and after"),
            "Every measure without steering, with steering, and with controls that change the activations by as much; 95 % "
            "intervals.",
        ),
        table(["measure", *(CONDITIONS[c] for c in conditions), "change when steered"], _rows(run, conditions)),
        paragraph("Changes are paired by question, in percentage points, with intervals over images.", soft=True),
        *_choice_of_strength(run),
        table(["format", "file in export/", "reason"], files) if files else "",
        stages=("steer", "evaluate", "export"),
    )


def _rows(run: RunFiles, conditions: list[str]) -> list[list[str]]:
    rows = []
    for name in run.rates["before"]:
        change = run.changes.get("after", {}).get(name)
        rows.append(
            [
                name,
                *(interval(run.rates[c][name]) if name in run.rates[c] else "" for c in conditions),
                f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]" if change else "",
            ]
        )
    return rows


def _choice_of_strength(run: RunFiles) -> list[str]:
    """Return the figure of errors against cost, and the methods that these data do not allow."""
    most = run.config.steer.max_drop
    guards = " and ".join(run.sweep.get("guards", ("neutral and typical questions",)))
    parts = []
    if not guards:
        parts.append(paragraph("These data have no questions that measure the cost of a correction: it is unknown."))
    if run.sweep["curves"]:
        applied = (run.sweep["method"], run.sweep["chosen"]["strength"])
        parts.append(
            figure(
                figures.tradeoff(run.sweep["curves"], applied, most, "Errors against cost"),
                f"On the discovery images: errors by prior against the largest loss in {guards or 'no measure'}, one point "
                f"for each strength. Dotted line: largest allowed cost ({percent(most)}). Circle: the strength that is "
                "applied. Lower and further left is better.",
            )
        )
        parts += [paragraph(f"Not derived: {n}. {reason}", soft=True) for n, reason in run.sweep["left_out"].items()]
    return parts
