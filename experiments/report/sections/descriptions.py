"""Descriptions in free text, with their objects, attributes and relations marked, and rates of wrong ones at each level."""

from __future__ import annotations

import json

from behavior import read_descriptions
from behavior.free_text.markup import STYLE, description_html, legend_html
from concepts.concept import LEVELS
from experiments.report.html import closed, interval, paragraph, section, table, text
from experiments.results.run_files import RunFiles
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file
from groundscope.core.statistics import Estimate

SHOWN = 6
"""Descriptions of a condition that are shown: those with the most wrong spans."""
CONDITIONS = {"before": "the model", "after": "steered", "twin": "the twin"}
"""Condition to its name in the page."""


def descriptions_section(run: RunFiles) -> str:
    """Return the section; empty for a run without descriptions."""
    rates: dict[str, dict[str, Estimate]] = {}
    parts: list[str] = []
    for condition, label in CONDITIONS.items():
        file = below(run.root, f"behavior/descriptions-{condition}.json", error=ConfigError)
        if not is_file(file):
            continue
        levels = json.loads(file.read_text(encoding="utf-8"))
        rates[label] = {level: Estimate(**levels[level]["wrong_of_judged"]) for level in LEVELS}
        rates[f"{label}, not decided"] = {level: Estimate(**levels[level]["unknown"]) for level in LEVELS}
        rows = sorted(
            read_descriptions(file.with_suffix(".jsonl")),
            key=lambda row: -sum(span.verdict == "wrong" for span in row.spans),
        )
        examples = "".join(f"<h4>{text(row.id)}</h4>{description_html(row)}" for row in rows[:SHOWN])
        parts.append(closed(f"descriptions-{condition}", f"Descriptions with the most wrong spans: {label}", examples))
    if not rates:
        return ""
    cells = [
        [name, *(interval(by_level[level]) if by_level[level].n else "-" for level in LEVELS)]
        for name, by_level in rates.items()
    ]
    return section(
        "descriptions",
        "Free text",
        paragraph(
            "Objects, attributes and relations in descriptions, parsed by rules and judged by the annotations of the images: "
            "share of wrong ones among those that the annotation decides, and share that it does not decide."
        ),
        table(["share", *LEVELS], cells),
        f"<style>{STYLE}</style>{legend_html()}",
        *parts,
        stages=("evaluate",),
    )
