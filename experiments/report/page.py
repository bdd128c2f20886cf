"""The report's sections: each reads `Facts` and returns HTML, or nothing where the run has nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from concepts.schema import LEVELS
from diagnosis.results import VERDICTS
from experiments.report import figures
from experiments.report.data import Facts
from experiments.report.diagnoses import unread, why_section
from experiments.report.example_story import apple_section
from experiments.report.figures import Point
from experiments.report.heads import heads_section
from experiments.report.html import figure, page, paragraph, percent, section, table, text
from experiments.report.levels import levels_section
from experiments.report.sources import sources_section
from experiments.run.context import Context
from experiments.run.folder import write_json, write_text

if TYPE_CHECKING:
    from circuits import HeadScores
    from lvlm import Head

CONDITIONS = {
    "before": "as it is",
    "after": "steered",
    "random direction": "control: random direction",
    "shuffled labels": "control: shuffled labels",
    "moved to other heads": "control: same directions, other heads",
    "derived at other heads": "control: same rule, other heads",
    "twin": "twin without the prior",
}
CONTROLS = tuple(name for name in CONDITIONS if CONDITIONS[name].startswith("control"))
ERRORS = (
    "conflict: wrong by prior",
    "adversarial absent: says yes",
    "popular absent: says yes",
    "random absent: says yes",
)


def make_report(context: Context, root: Path) -> str:
    """Write ``report.html`` into the run's folder; `root` keeps the tables it shows."""
    facts = Facts(context)
    parts = [(name, link, found) for name, link, make in SECTIONS if (found := make(facts))]
    title = context.config.report.title or f"groundscope: {context.config.model.path}"
    document = page(title, context.headline(), parts)
    write_text(context.folder.path / "report.html", document)
    write_json(root / "sections.json", [name for name, _, _ in parts])
    return f"{len(parts)} sections, {len(document) / 1e6:.1f} MB"


def _interval(point: object) -> str:
    value, low, high = (getattr(point, name) for name in ("value", "low", "high"))
    few = " (few images)" if getattr(point, "few_groups", False) else ""
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]{few}"


def _effect(scores: HeadScores, head: Head) -> str:
    low, high = scores.interval()
    at = (head.layer, head.head)
    return _interval(Point(float(scores.mean[at]), float(low[at]), float(high[at])))


def summary(facts: Facts) -> str:
    """Answer the four questions, each in two sentences with figures."""
    before, after = facts.rates["before"], facts.rates.get("after", facts.rates["before"])
    known = [
        f"{level} {_interval(Point(best.value, best.low, best.high))} at {best.place} (shuffled {percent(best.control)})"
        for level in LEVELS
        if (best := facts.best(level, "last")) is not None
    ]
    where = "Linear probes at the last token read " + "; ".join(known) + "." if known else "No probe had enough data."
    if facts.no_probes and not facts.grids:
        where = f"No probe was fitted: {facts.no_probes}."
    best = {kind: scores.top(1)[0] for kind, scores in facts.heads.items()}
    what = (
        "No head could be scored: the images hardly change the answers."
        if not best
        else "Of what changes an answer, one head alone brings back: "
        + "; ".join(f"{kind} {_effect(facts.heads[kind], head)} by {head}" for kind, head in best.items())
        + ". Every head was patched, exactly."
    )
    rows = facts.known()
    if rows:
        seen = max((r for r in rows if "object tokens" in r[0]), key=lambda r: r[1], default=rows[0])
        last = max((r for r in rows if "last token" in r[0]), key=lambda r: r[1], default=rows[0])
        why = (
            f"In {rows[0][3]} answers the prior got wrong, probes still read the true color at {seen[0]} in {percent(seen[1])} "
            f"and at {last[0]} in {percent(last[1])}: it was seen, and lost on the way to the answer."
            if seen[1] > 0.5
            else f"In {rows[0][3]} answers the prior got wrong, probes read the true color in at most {percent(seen[1])}."
        )
    else:
        why = (
            f"{len(facts.misled)} answers follow the prior against the image, but too few images show each color to fit "
            "probes that could follow it."
            if facts.misled
            else "These data have no answers that are wrong by a known prior."
        )
    if facts.diagnoses is not None:
        told = sorted(
            ((sum(o.verdict == v for o in facts.diagnoses.wrong), v) for v in VERDICTS), key=lambda item: -item[0]
        )
        listed = ", ".join(f"{n} {verdict}" for n, verdict in told if n)
        why += " ".join(
            [
                "",
                f"Of {len(facts.diagnoses.wrong)} wrong answers diagnosed one by one: {listed}.",
                *unread(facts.diagnoses),
            ]
        )
    moved = [f"{name}: {_interval(before[name])} → {_interval(after[name])}" for name in ERRORS[:2] if name in before]
    guard = "neutral: right" if "neutral: right" in before else "all: right"
    chosen = facts.sweep["chosen"]
    if chosen["strength"]:
        kept = f"{guard} {percent(before[guard].value)} → {percent(after[guard].value)}"
        correct = f"{'; '.join([*moved, kept])}. Controls of the same size are shown below."
    elif facts.sweep["curves"]:
        correct = "No strength of this vector made fewer errors within the allowed cost, so none is applied."
    else:
        reasons = "; ".join(facts.sweep["left_out"].values()) or "patching could score no head"
        correct = f"No vector was made: {reasons}."
    items = (
        ("Where is it known?", where, "known" if facts.grids else "accuracy"),
        ("What uses it?", what, "used"),
        ("Why was it wrong?", why, "why" if facts.diagnoses is not None else "accuracy"),
        ("What corrects it?", correct, "corrected" if "after" in facts.rates else "accuracy"),
    )
    body = "".join(f'<li><strong><a href="#{link}">{text(q)}</a></strong>{text(a)}</li>' for q, a, link in items)
    note = paragraph("In brackets: 95 % intervals over images.", soft=True)
    return section("summary", "Four answers", f'<ul class="answers">{body}</ul>', note)


def accuracy(facts: Facts) -> str:
    """Show what the model says, split by what could mislead it, beside its twin."""
    series = {run: facts.rates[run] for run in ("before", "twin") if run in facts.rates}
    good = {run: _points(found, lambda name: "right" in name or "recall" in name) for run, found in series.items()}
    bad = {
        run: _points(found, lambda name: "says" in name or "wrong" in name or "CHAIR" in name)
        for run, found in series.items()
    }
    parts = [
        paragraph(
            "Test questions on images that nothing was found, fitted or chosen on. "
            "Bars are 95 % intervals from a bootstrap over images."
        ),
        figure(figures.rates(good, CONDITIONS, "Right answers"), "Share of right answers by split; higher is better."),
    ]
    if next(iter(bad.values())):
        parts.append(
            figure(figures.rates(bad, CONDITIONS, "Errors"), "Share of errors by what misleads; lower is better.")
        )
    return section("accuracy", "What the model says", *parts, made=("evaluate",))


def _points(found: dict, wanted: Callable[[str], bool]) -> dict[str, Point]:
    return {name: Point(e.value, e.low, e.high, e.n) for name, e in found.items() if wanted(name)}


def known(facts: Facts) -> str:
    """Show where concepts can be decoded."""
    parts = [
        paragraph(
            "Logistic probes, fitted on part of the images and scored once on others; an image is never on both sides. "
            "The control repeats everything with shuffled labels."
        )
    ]
    rows = []
    for level in LEVELS:
        found = facts.level_arrays("decoder", "z", "last", level)
        if found is not None:
            rows.append((f"{level} ({len(found[2])} concept{'s' if len(found[2]) > 1 else ''})", found[0], found[1]))
    if rows:
        parts.append(
            figure(
                figures.grids(rows),
                "Balanced accuracy of probes on each head's output at the last token, averaged over the concepts of a "
                "level; right: the same with shuffled labels.",
            )
        )
    for tokens, name in (("object:mean", "the object's image tokens"), ("last", "the last token")):
        lines, control = {}, {}
        for level in LEVELS:
            points = facts.way(level, tokens)
            if points:
                lines[level] = [p[:4] for p in points]
                control |= {p[0]: p[4] for p in points}
        if lines:
            parts.append(
                figure(
                    figures.path(lines, control, f"Read at {name}"),
                    f"Balanced accuracy of probes at {name}, from the vision tower through the projector into the decoder.",
                )
            )
    return section("known", "Where it is known", *parts, made=("trace", "probe")) if len(parts) > 1 else ""


def used(facts: Facts) -> str:
    """Show which heads carry it."""
    if not facts.heads:
        return section("used", "What uses it", *(paragraph(f"{kind}: {why}") for kind, why in facts.left_out.items()))
    panels = [(f"{kind} ({s.n_pairs} pairs)", s.mean) for kind, s in facts.heads.items()]
    marked = [tuple(int(n[1:]) for n in head.split(".")) for head in facts.top]
    rows = []
    for head in facts.top:
        layer, number = (int(n[1:]) for n in head.split("."))
        cells = [head]
        for scores in facts.heads.values():
            low, high = scores.interval()
            mean = float(scores.mean[layer, number])
            cells.append(f"{mean:+.3f} [{low[layer, number]:+.3f}, {high[layer, number]:+.3f}]")
        rows.append(cells)
    excluded = ", ".join(f"{s.excluded} of {s.n_pairs + s.excluded} {kind}" for kind, s in facts.heads.items())
    notes = "".join(
        paragraph(f"Not made: pairs of kind {kind}. {why}", soft=True) for kind, why in facts.left_out.items()
    )
    return section(
        "used",
        "What uses it",
        paragraph(
            "Each head's output at the last token of the clean run is put into the run on the changed image, "
            "one head at a time, exactly. 1 would bring the whole difference between the two answers back."
        ),
        figure(
            figures.effects(panels, [(m[0], m[1]) for m in marked]),
            "Patching effect of each head by kind of pair; framed: the heads carried on with.",
        ),
        table(["head", *facts.heads], rows),
        paragraph(f"Pairs left out because the two images hardly change the answer: {excluded}.", soft=True),
        notes,
        made=("patch",),
    )


def corrected(facts: Facts) -> str:
    """Show what steering does, beside its controls."""
    if "after" not in facts.rates:
        return ""
    runs = [r for r in ("before", "after", *CONTROLS) if r in facts.rates]
    tint = {"before": "before", "after": "after"}
    tint |= dict(zip(CONTROLS, ("control", "shuffled", "moved", "derived"), strict=True))
    names = [n for n in facts.rates["before"] if n != "all: right" or len(facts.rates["before"]) < 4]
    series = {tint[r]: _points(facts.rates[r], lambda n: n in names) for r in runs}
    labels = {tint[r]: CONDITIONS[r] for r in runs}
    head = ["measure", *(CONDITIONS[r] for r in runs), "change when steered"]
    rows = []
    for name in facts.rates["before"]:
        change = facts.changes["after"].get(name)
        rows.append(
            [
                name,
                *(_interval(facts.rates[r][name]) if name in facts.rates[r] else "" for r in runs),
                f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]" if change else "",
            ]
        )
    chosen = facts.sweep["chosen"]
    most = facts.context.config.steer.max_drop
    guarded = " and ".join(facts.sweep.get("guards", ("neutral and typical questions",)))
    parts = (
        [] if guarded else [paragraph("These data have no questions to guard: what the correction costs is unknown.")]
    )
    if facts.sweep["curves"]:
        parts.append(
            figure(
                figures.tradeoff(
                    facts.sweep["curves"],
                    (facts.sweep["method"], chosen["strength"]),
                    most,
                    "Benefit against side effect",
                ),
                f"On the images things were found on: errors by prior against the largest loss among {guarded or 'nothing'}, "
                f"a point a strength. Dotted: the most it may cost ({percent(most)}); circled: the strength that is "
                "applied. Lower and further left is better.",
            )
        )
        parts += [paragraph(f"Not made: {name}. {why}", soft=True) for name, why in facts.sweep["left_out"].items()]
    files = [(name, file, "") for name, file in facts.exports["written"].items()]
    files += [(name, "not written", why) for name, why in facts.exports["refused"].items()]
    return section(
        "corrected",
        "What corrects it",
        paragraph(
            f"Method {facts.sweep['method']} at heads {', '.join(facts.top)}, strength {chosen['strength']:g}, chosen "
            f"on the images things were found on by this rule: {facts.sweep['rule']}. Reported here on the test images."
        ),
        figure(
            figures.rates(series, labels, "Before and after"),
            "Every measure as it is, steered, and under controls that push as far, with 95 % intervals.",
        ),
        table(head, rows),
        paragraph("Changes are paired, question by question, in points, with intervals over images.", soft=True),
        *parts,
        table(["format", "file in export/", "why not"], files) if files else "",
        made=("steer", "evaluate", "export"),
    )


def made(facts: Facts) -> str:
    """Say what was run, with what, and where every file is."""
    packages = ", ".join(f"{k} {v}" for k, v in facts.environment["packages"].items() if v)
    stages = facts.stages()
    rows = [
        (
            stage,
            what,
            f"{folder}/",
            f"groundscope resume={facts.root} stages=[{stage}] force=true",
            f"{seconds:.1f}",
            key,
        )
        for stage, what, folder, seconds, key in stages
    ]
    return section(
        "made",
        "How this was made",
        table(
            ["stage", "what", "files", "to make it again", "seconds", "key"],
            rows,
            [f"made-{stage}" for stage, *_ in stages],
        ),
        paragraph(
            f"Run folder {facts.root}; options in config.yaml, answers in behavior/, scores in circuits/, probes in probes/.",
            soft=True,
        ),
        paragraph(f"Python {facts.environment['python']} on {facts.environment['system']}; {packages}.", soft=True),
    )


SECTIONS: tuple[tuple[str, str, Callable[[Facts], str]], ...] = (
    ("summary", "Four answers", summary),
    ("apple", "The green apple", apple_section),
    ("levels", "Level by level", levels_section),
    ("accuracy", "What it says", accuracy),
    ("known", "Where it is known", known),
    ("used", "What uses it", used),
    ("heads", "Head by head", heads_section),
    ("sources", "What answers came from", sources_section),
    ("why", "Why it was wrong", why_section),
    ("corrected", "What corrects it", corrected),
    ("made", "How this was made", made),
)
"""(name, link, maker) of every section, in order."""
