"""The four questions level by level: what is known, used, lost and corrected of objects, attributes and relations."""

from __future__ import annotations

from collections import Counter

from concepts.schema import LEVELS
from experiments.report.data import Facts
from experiments.report.html import paragraph, percent, section, table
from experiments.report.sources import PARTS, shares

KINDS = {"color": "attribute"}
"""Level of a kind of pair (`concepts.counterfactuals.KINDS`) that is not called after its level."""
HEADS = 3
"""Heads named at most."""


def levels_section(facts: Facts) -> str:
    """Return the section: a row a question, a column a level; nothing where the data have one level only."""
    levels = [level for level in LEVELS if any(e.level == level for e in facts.context.discovery)]
    if len(levels) < 2:
        return ""
    rows = [
        ["right when nothing misleads", *(_rate(facts, "before", level) for level in levels)],
        ["the same, steered", *(_rate(facts, "after", level) for level in levels)],
        ["read at image tokens", *(_spot(facts, level, "object:mean", "image:mean") for level in levels)],
        ["read at the last token", *(_spot(facts, level, "last") for level in levels)],
        ["heads that bring it back", *(_heads(facts, level) for level in levels)],
        ["what brought wrong answers", *(_sources(facts, level) for level in levels)],
        ["why they were wrong", *(_verdicts(facts, level) for level in levels)],
    ]
    return section(
        "levels",
        "Level by level",
        table(["level", *levels], [row for row in rows if any(cell != "-" for cell in row[1:])]),
        paragraph(
            "Reading: balanced accuracy of probes on held-out images, at the layer that was best in training; image tokens are "
            "those of the object asked about, or all. Heads: share of the answer each brings back alone. Sources: log-odds of "
            "the answer given. Each row has its own section below.",
            soft=True,
        ),
        made=("probe", "patch", "diagnose", "evaluate"),
    )


def _rate(facts: Facts, run: str, level: str) -> str:
    found = facts.rates.get(run, {}).get(f"neutral, {level}: right")
    return f"{percent(found.value)} [{100 * found.low:.1f}, {100 * found.high:.1f}]" if found else "-"


def _spot(facts: Facts, level: str, *tokens: str) -> str:
    """Name the best layer for the first of these tokens that the level was probed at."""
    best = next((found for at in tokens if (found := facts.best(level, at)) is not None), None)
    return f"{percent(best.value)} [{100 * best.low:.0f}, {100 * best.high:.0f}], {best.place}" if best else "-"


def _heads(facts: Facts, level: str) -> str:
    found = [
        f"{head} {scores.mean[head.layer, head.head]:.0%}".replace("%", "\u00a0%")
        for kind, scores in facts.heads.items()
        if KINDS.get(kind, kind) == level
        for head in scores.top(HEADS)
    ]
    return ", ".join(found) or "-"


def _sources(facts: Facts, level: str) -> str:
    share = next((s for s in shares(facts) if s.level == level and not s.right), None)
    return ", ".join(f"{part} {share.parts[part].value:+.1f}" for part in PARTS) if share else "-"


def _verdicts(facts: Facts, level: str) -> str:
    if facts.diagnoses is None:
        return "-"
    counts = Counter(str(one.verdict) for one in facts.diagnoses.wrong if one.example["level"] == level)
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()) or "-"
