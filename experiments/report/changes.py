"""What changed inside: a page about a comparison of two models, or of one before and after tuning or steering."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnosis.results import RIGHT, VERDICTS
from experiments.report.html import page, paragraph, percent, section, table
from groundscope.core.files import write_text

if TYPE_CHECKING:
    from diagnosis import ModelComparison

MAX_ROWS = 12
"""Single probes, and heads of a kind of pair, that are shown."""


def write_changes(comparison: ModelComparison, path: Path) -> None:
    """Write the page as one HTML file without scripts."""
    write_text(path, changes_page(comparison))


def changes_page(comparison: ModelComparison) -> str:
    """Return the page: answers, verdicts, probes, heads, and where the numbers come from."""
    title = "groundscope: what changed inside"
    lead = f"{comparison.second} against {comparison.first}; differences with 95 % intervals over images"
    parts = [(name, link, html) for name, link, html in changes_sections(comparison) if html]
    return page(title, lead, parts)


def changes_sections(comparison: ModelComparison) -> tuple[tuple[str, str, str], ...]:
    """Return id, link and HTML of each section; the HTML of a part that neither model has is empty."""
    return (
        ("answers", "Answers", _answers(comparison)),
        ("verdicts", "Verdicts", _verdicts(comparison)),
        ("probes", "Probes", _probes(comparison)),
        ("heads", "Heads", _heads(comparison)),
        ("origin", "Origin", _origin(comparison)),
    )


def _answers(comparison: ModelComparison) -> str:
    rows = comparison.frame("answers").to_dict("records")
    if not rows:
        return ""
    head = ["measure", "questions", "before", "after", "difference", "gained", "lost", "p"]
    body = [
        (r["measure"], r["n"], percent(r["first"]), percent(r["second"]), _points(r), r["gained"], r["lost"], f"{r['p']:.2g}")
        for r in rows
    ]  # fmt: skip
    about = (
        "Every question is answered by both. Gained: questions for which the measure holds after only; p: exact test that gains "
        "and losses are equally likely, by image."
    )
    return section("answers", "Answers", paragraph(about, soft=True), table(head, body))


def _verdicts(comparison: ModelComparison) -> str:
    counts: dict[tuple[str, str], int] = {
        (r["first"], r["second"]): int(r["n"]) for r in comparison.frame("verdicts").to_dict("records")
    }
    if not counts:
        return ""
    names = [v for v in (RIGHT, *VERDICTS) if any(v in pair for pair in counts)]
    body = [(first, *(counts.get((first, second), "") for second in names)) for first in names]
    same = sum(n for (first, second), n in counts.items() if first == second)
    about = (
        f"Rows: verdict before; columns: verdict after; {same} of {sum(counts.values())} answers have the same. A verdict is the "
        "cause of a wrong answer; both models have probes of their own."
    )
    return section("verdicts", "Verdicts", paragraph(about, soft=True), table(["before \\ after", *names], body))


def _probes(comparison: ModelComparison) -> str:
    frame: Any = comparison.frame("probes")
    if not len(frame):
        return ""
    frame["changed"] = (frame["low"] > 0) | (frame["high"] < 0)
    places = [
        (grid, layer, len(part), percent(part["first"].mean()), percent(part["second"].mean()),
         f"{100 * part['difference'].mean():+.1f}", int(part["changed"].sum()))
        for (grid, layer), part in frame.groupby(["grid", "layer"], sort=False)
    ]  # fmt: skip
    strongest = frame[frame["changed"]].assign(size=frame["difference"].abs()).nlargest(MAX_ROWS, "size")
    single = [
        (r["grid"], r["layer"], r["head"] if r["head"] == r["head"] and r["head"] is not None else "", r["concept"],
         percent(r["first"]), percent(r["second"]), _points(r))
        for r in strongest.astype({"head": object}).where(strongest.notna(), None).to_dict("records")
    ]  # fmt: skip
    about = (
        "Held-out accuracy of probes that are fitted to each model, means over concepts and heads of a place. "
        f"{int(frame['changed'].sum())} of {len(frame)} single probes changed beyond their interval; about "
        f"{0.05 * len(frame):.0f} do by chance."
    )
    head = ["place", "layer", "probes", "before", "after", "difference", "changed"]
    parts = [paragraph(about, soft=True), table(head, places)]
    if single:
        columns = ["place", "layer", "head", "concept", "before", "after", "difference"]
        parts += [paragraph("Largest changes beyond their interval:"), table(columns, single)]
    return section("probes", "Probes", *parts)


def _heads(comparison: ModelComparison) -> str:
    frame: Any = comparison.frame("heads")
    if not len(frame):
        return ""
    parts = []
    rankings = {r["kind"]: r for r in comparison.frame("ranking").to_dict("records")}
    for kind, part in frame.groupby("kind", sort=False):
        ranking, strength = rankings[kind], part[["first", "second"]].abs().max(axis=1)
        changed = int(((part["low"] > 0) | (part["high"] < 0)).sum())
        rows = part.loc[strength.nlargest(MAX_ROWS).index].to_dict("records")
        parts.append(
            paragraph(
                f"Pairs of kind {kind}: rank correlation of all heads {ranking['rank_correlation']:.2f} "
                f"[{ranking['rank_correlation_low']:.2f}, {ranking['rank_correlation_high']:.2f}]; {changed} of {len(part)} "
                f"heads changed beyond their interval, about {0.05 * len(part):.0f} do by chance. The strongest heads of either:"
            )
        )
        body = [(r["name"], f"{r['first']:+.3f}", f"{r['second']:+.3f}", _difference(r)) for r in rows]
        parts.append(table(["head", "effect before", "effect after", "difference"], body))
    about = "Effect of a head: share of the answer's log-odds that its activation from the other image restores."
    return section("heads", "Heads", paragraph(about, soft=True), *parts)


def _origin(comparison: ModelComparison) -> str:
    rows = [
        (side, name, value)
        for side in ("first", "second")
        for name, value in dict(comparison.provenance.get(side) or {}).items()
        if isinstance(value, str | int | float)
    ]
    notes = [paragraph(f"Not compared: {note}") for note in comparison.notes]
    return section("origin", "Origin", *notes, table(["model", "field", "value"], rows))


def _points(row: Any) -> str:
    """Return a difference of rates in percentage points with its interval."""
    return f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def _difference(row: Any) -> str:
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
