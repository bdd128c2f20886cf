"""Effect and cost of the correction, with its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.report import figures
from experiments.report.html import figure, interval, paragraph, percent, section, table
from experiments.report.sections.accuracy import CONDITIONS, points
from experiments.results.run_files import RunFiles

CONTROLS = tuple(name for name, label in CONDITIONS.items() if label.startswith("control"))
_STYLES = {"before": "before", "after": "after", "exportable": "exportable"} | dict(
    zip(CONTROLS, ("control", "shuffled", "moved", "derived"), strict=True)
)
"""Condition to its style in `figures.rates`."""


def correction_section(run: RunFiles) -> str:
    """Return the section; empty if the model was not steered."""
    if not {"after", "exportable"} & set(run.rates):
        return ""
    conditions = [c for c in _STYLES if c in run.rates]
    names = [n for n in run.rates["before"] if n != "all: right" or len(run.rates["before"]) < 4]
    series = {_STYLES[c]: points(run.rates[c], lambda name: name in names) for c in conditions}
    labels = {_STYLES[c]: CONDITIONS[c] for c in conditions}
    chosen, exportable = run.sweep["chosen"], run.sweep.get("exportable")
    vectors = run.exports.get("vectors", {})
    files = [(name, file, vectors.get(name, ""), "") for name, file in run.exports["written"].items()]
    files += [(name, "not written", "", reason) for name, reason in run.exports["refused"].items()]
    return section(
        "corrected",
        "What corrects it",
        paragraph(
            f"Method {run.sweep['method']} at {_place(run)} with strength {chosen['strength']:g}, chosen "
            f"on the discovery images by this rule: {run.sweep['rule']}. The results below are on the test images."
            if "after" in run.rates
            else f"Method {run.sweep['method']} made no vector. The results below are on the test images."
        ),
        _exportable(exportable) if exportable else "",
        figure(
            figures.rates(series, labels, "Before and after"),
            "Every measure without steering, with steering, and with controls that change the activations by as much; 95 % "
            "intervals.",
        ),
        table(["measure", *(CONDITIONS[c] for c in conditions), "change when steered"], _rows(run, conditions)),
        paragraph("Changes are paired by question, in percentage points, with intervals over images.", soft=True),
        *_guards(run),
        *_choice_of_strength(run),
        table(["format", "file in export/", "vector", "reason"], files) if files else "",
        paragraph("export/README.md shows the lines that apply a file without groundscope.", soft=True)
        if vectors
        else "",
        stages=("steer", "evaluate", "export"),
    )


def _place(run: RunFiles) -> str:
    return run.config.steer.site or f"heads {', '.join(run.top_heads)}"


_WITHOUT_ERROR = (
    " There are too few captions to show that they lose less than the limits: the losses are within the limits, but not with a "
    "standard error added."
)


def _exportable(record: Mapping[str, Any]) -> str:
    """Return the sentence on the vector that other software can hold."""
    strength = record["chosen"]["strength"]
    if not strength:
        return paragraph(
            f"Exportable vector: at no strength of {record['name']} do all guards hold, so it is not applied."
        )
    return paragraph(
        f"Exportable vector: {record['name']} with strength {strength:g}, the best of {len(record['curves'])} that add the same "
        "to every input, as other software can. It is derived on one half of the discovery images and chosen on the other."
        + (_WITHOUT_ERROR if record.get("caution") == 0 else "")
    )


def _guards(run: RunFiles) -> list[str]:
    """Return the table of what the correction costs."""
    record = run.guards
    if record is None:
        return []
    conditions = [c for c in ("after", "exportable") if c in record["conditions"]]
    rows = []
    for name, label in record["labels"].items():
        results = [record["conditions"][c].get(name) for c in conditions]
        if not any(results):
            continue
        limit, words = record["limits"].get(name), name == "caption_length"
        before = next(r["before"] for r in results if r)
        cells = [_guard_value(before, words=words)]
        for result in results:
            cells += [_guard_value(result["after"], words=words), _loss(result["loss"], limit)] if result else ["", ""]
        rows.append([label, *cells, "none" if limit is None else f"{100 * limit:g}"])
    heads = [h for c in conditions for h in (CONDITIONS[c], "loss")]
    parts = [
        paragraph(
            "What it costs: each guard on the test images, with the loss that the rule allows on the discovery images."
        ),
        table(["guard", "not steered", *heads, "limit of the loss"], rows),
        paragraph(
            "Losses are paired, in percentage points (of the number of words for captions' length), with 95 % intervals over "
            "images; negative values are gains. A loss above its limit is marked with an exclamation mark.",
            soft=True,
        ),
    ]
    missing = [f"{record['labels'].get(n, n)}: {reason}" for n, reason in record["not_measured"].items()]
    return [*parts, *(paragraph(line, soft=True) for line in missing)]


def _guard_value(e: Mapping[str, float], *, words: bool) -> str:
    if words:
        return f"{e['value']:.1f} [{e['low']:.1f}, {e['high']:.1f}]"
    return f"{100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"


def _loss(e: Mapping[str, float], limit: float | None) -> str:
    mark = " !" if limit is not None and e["value"] > limit else ""
    return f"{100 * e['value']:+.1f} [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]{mark}"


def _rows(run: RunFiles, conditions: list[str]) -> list[list[str]]:
    rows = []
    for name in run.rates["before"]:
        change = run.changes.get("after", run.changes.get("exportable", {})).get(name)
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
