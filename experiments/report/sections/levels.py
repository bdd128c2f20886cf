"""The four questions by level: objects, attributes, relations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from concepts.concept import LEVELS
from experiments.report.derived import best_layer
from experiments.report.html import paragraph, percent, section, table
from experiments.report.sections.input_attribution import shares
from experiments.results.run_files import RunFiles

KINDS: Mapping[str, str] = {"color": "attribute"}
"""Kind of pair to its level, if it is not called after its level."""
HEADS = 3
"""Largest number of heads per level."""


def levels_section(run: RunFiles) -> str:
    """Return the section, one row for each question and one column for each level; empty for data of one level."""
    levels = [level for level in LEVELS if any(e.level == level for e in run.examples.values())]
    if len(levels) < 2:
        return ""
    rows = [
        ["right answers, neutral questions", *(_rate(run, "before", level) for level in levels)],
        ["the same, steered", *(_rate(run, "after", level) for level in levels)],
        ["probes at image tokens", *(_accuracy(run, level, "object:mean", "image:mean") for level in levels)],
        ["probes at the last token", *(_accuracy(run, level, "last") for level in levels)],
        ["heads with the largest effect", *(_heads(run, level) for level in levels)],
        ["sources of wrong answers", *(_sources(run, level) for level in levels)],
        ["verdicts on wrong answers", *(_verdicts(run, level) for level in levels)],
    ]
    return section(
        "levels",
        "By level",
        table(["level", *levels], [row for row in rows if any(cell != "-" for cell in row[1:])]),
        paragraph(
            "Probes: balanced accuracy on held-out images, at the layer that is best in validation; image tokens are those of "
            "the object in question, or all. Heads: share of the answer that the head restores alone. Sources: log-odds of the "
            "true answer against the model's. Each row has a section below.",
            soft=True,
        ),
        stages=("probe", "patch", "diagnose", "evaluate"),
    )


def _rate(run: RunFiles, condition: str, level: str) -> str:
    rate = run.rates.get(condition, {}).get(f"neutral, {level}: right")
    return f"{percent(rate.value)} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" if rate else "-"


def _accuracy(run: RunFiles, level: str, *tokens: str) -> str:
    """Return the accuracy at the best layer, for the first of these token selections at which the level was probed."""
    best = next((accuracy for at in tokens if (accuracy := best_layer(run, level, at)) is not None), None)
    return f"{percent(best.value)} [{100 * best.low:.0f}, {100 * best.high:.0f}], {best.place}" if best else "-"


def _heads(run: RunFiles, level: str) -> str:
    heads = [
        f"{head} {scores.mean[head.layer, head.head]:.0%}".replace("%", "\u00a0%")
        for kind, scores in run.head_scores.items()
        if KINDS.get(kind, kind) == level
        for head in scores.top(HEADS)
    ]
    return ", ".join(heads) or "-"


def _sources(run: RunFiles, level: str) -> str:
    share = next((s for s in shares(run) if s.level == level and not s.right), None)
    return ", ".join(f"{part} {share.parts[part].value:+.1f}" for part in share.parts) if share else "-"


def _verdicts(run: RunFiles, level: str) -> str:
    if run.diagnoses is None:
        return "-"
    counts = Counter(str(d.verdict) for d in run.diagnoses.wrong if d.example["level"] == level)
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()) or "-"
