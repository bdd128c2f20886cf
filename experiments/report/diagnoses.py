"""Why answers are wrong: verdicts by level and split, and some answers in full."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from concepts.schema import Example
from diagnosis.narrative import named_stages, verdict_of
from diagnosis.results import (
    LOST,
    NOT_INTEGRATED,
    NOT_SEEN,
    OVERRIDDEN,
    OVERRIDDEN_LATE,
    STAGES,
    UNEXPLAINED,
    VERDICTS,
    Diagnoses,
    Diagnosis,
    kind_of,
)
from experiments.report import figures
from experiments.report.data import Facts
from experiments.report.html import figure, paragraph, picture, section, table, text
from groundscope.core.statistics import estimate

MEANING = {
    "not seen": "the vision tower's probe of this concept reads another answer, or is shown to be at chance, and no later one "
    "reads the truth",
    "lost at the projector": "the vision tower reads it, the projector and all after it do not",
    "not integrated": "it is read at the image's tokens, never at the last token, where the answer is read",
    "overridden by the prior": "the last token reads it; without what pushes another answer (what all such answers lean to, or "
    "heads and MLPs) it is right; and the words alone suggest that answer: it is the same about a blank picture",
    "overridden late": "the same, but the words alone do not suggest that answer",
    "not readable": "the stage that decides has no probe of this concept, or only one whose interval says nothing",
    "other": "none of these; the reason is given",
}


def why_section(facts: Facts) -> str:
    """Return the section; with only the reason where nothing could be diagnosed, and nothing where it was not tried."""
    found = facts.diagnoses
    if found is None:
        return section("why", "Why it was wrong", paragraph(facts.undiagnosed)) if facts.undiagnosed else ""
    meaning = "".join(f"<dt>{text(verdict)}</dt><dd>{text(what)}</dd>" for verdict, what in MEANING.items())
    shown = _chosen(found, facts.context.config.diagnose.shown)
    by_id = {e.id: e for e in facts.context.discovery}
    return section(
        "why",
        "Why it was wrong",
        paragraph(
            f"{len(found.wrong)} wrong answers to the questions that things were found on, on images that no probe was fitted "
            "to, each with the last place at which a probe reads the truth. Shares have 95 % intervals over images."
        ),
        *(paragraph(sentence) for sentence in unread(found)),
        f'<dl class="meaning">{meaning}</dl>',
        table(["level", "split", "wrong", *VERDICTS], _rows(found)),
        *_left_out(found),
        paragraph(
            "What cut it short is found by patching: each head and MLP is put, at the last token, to its usual value over right "
            "answers to questions of the kind; parts that right answers need as well do not count.",
            soft=True,
        ),
        *(
            _told(found, found.examples.index(one), by_id[one.example["id"]])
            for one in shown
            if one.example["id"] in by_id
        ),
        made=("trace", "diagnose"),
    )


def unread(found: Diagnoses) -> list[str]:
    """Say for each kind of question which stages no probe reads in any of its wrong answers, and what follows from that."""
    kinds: dict[str, list[Diagnosis]] = {}
    for one in found.wrong:
        kinds.setdefault(kind_of(one), []).append(one)
    groups: dict[tuple[str, ...], list[str]] = {}
    for kind, ones in kinds.items():
        missing = tuple(stage for stage in STAGES if all(stage in one.unread for one in ones))
        groups.setdefault(missing, []).append(f"{kind} ({len(ones)})")
    sentences = []
    for missing, names in groups.items():
        out = [verdict for verdict, possible in _reachable(missing).items() if not possible]
        if missing:
            without = f" The verdicts {', '.join(out)} cannot be reached there." if out else ""
            sentences.append(f"Not read in wrong answers of kind {', '.join(names)}: {named_stages(missing)}.{without}")
    return sentences


def _reachable(missing: Sequence[str]) -> dict[str, bool]:
    """Return which verdicts can be reached where some stages are not read."""
    read = {stage: stage not in missing for stage in STAGES}
    between = read["projector"] or read["image"]
    return {
        NOT_SEEN: read["vision"],
        LOST: read["vision"] and between,
        NOT_INTEGRATED: between and read["last"],
        OVERRIDDEN: read["last"],
        OVERRIDDEN_LATE: read["last"],
    }


def _left_out(found: Diagnoses) -> list[str]:
    """Name the concepts that have no probe at some place."""
    names = sorted(found.provenance.get("left_out", {}))
    return [paragraph(f"Too few images for a probe at some place: {', '.join(names)}.", soft=True)] if names else []


def _rows(found: Diagnoses) -> list[list[str]]:
    keys = sorted({(one.example["level"], one.example["split"]) for one in found.wrong})
    rows = []
    for key in [*keys, ("all", "")]:
        ones = [o for o in found.wrong if key[0] == "all" or (o.example["level"], o.example["split"]) == key]
        cells = []
        for verdict in VERDICTS:
            share = estimate([o.verdict == verdict for o in ones], [o.example["group"] for o in ones])
            count = sum(o.verdict == verdict for o in ones)
            cells.append(
                f"{100 * share.value:.0f}\u00a0% [{100 * share.low:.0f},\u00a0{100 * share.high:.0f}]" if count else "-"
            )
        rows.append([*key, str(len(ones)), *cells])
    return rows


def _chosen(found: Diagnoses, count: int) -> list[Diagnosis]:
    """Choose answers of as many verdicts and levels as there are, the surest of each first."""
    parts: dict[tuple[str, str], list[Diagnosis]] = {}
    for one in sorted(found.wrong, key=lambda o: o.confidence):
        parts.setdefault((str(one.verdict), one.example["level"]), []).append(one)
    # What a prior did is what most people look for; what was not explained comes last.
    order = sorted(parts, key=lambda key: (key[0] in UNEXPLAINED, key[0] != OVERRIDDEN, VERDICTS.index(key[0]), key[1]))
    chosen: list[Diagnosis] = []
    while len(chosen) < count and any(parts.values()):
        for key in order:
            if parts[key] and len(chosen) < count:
                chosen.append(parts[key].pop())
    return chosen


def _told(found: Diagnoses, index: int, example: Example) -> str:
    """Return the block of one answer: image, facts, words and the way of the truth through the model."""
    one = found[index]
    image = example.image.load()
    enlarged = image.resize((image.width * 3, image.height * 3), resample=0) if image.width < 200 else image
    facts_list = [
        ("question", one.example["question"]),
        ("the model says", one.said),
        ("the truth", one.example["truth"]),
        ("verdict", verdict_of(one)),
        ("without the image", one.without_image),
    ]
    alone = one.lean > 0 and not one.undone_by
    if one.pushes and not alone:
        pushes = ", ".join(f"{p.part} ({p.effect:+.2f})" for p in one.pushes[:3])
        facts_list.append(("pushes, and what their loss brings", pushes))
    if alone:
        facts_list.append(("without what such answers lean to", f"right: they lean to it by {one.lean:.1f} logits"))
    elif one.undone_by:
        lean = f" and {one.lean:.1f} logits that all such answers lean" if one.lean > 0 else ""
        facts_list.append(
            ("undone by", f"{', '.join(one.undone_by)}{lean}: log-odds {one.log_odds:+.2f} → {one.undone:+.2f}")
        )
    if one.sources:
        split = ", ".join(f"{name} {one.sources[name]:+.2f}" for name in ("image", "prompt", "prior"))
        facts_list.append(("log-odds of its answer", f"{one.sources['log_odds']:+.2f} = {split}"))
    pairs = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts_list)
    described = f"{one.example['question']} {one.example['truth']}"
    parts = [
        f"<h3>{text(one.example['question'])} “{text(one.said)}”</h3>",
        f'<div class="apple">{picture(enlarged, described)}<dl>{pairs}</dl></div>',
        paragraph(found.text(index)),
    ]
    places = [(_place(r.stage, r.layer), r.log_odds, r.state) for r in one.readings]
    if any(not math.isnan(v) for _, v, _ in places):
        read = [s for s in STAGES if any(r.stage == s and not math.isnan(r.log_odds) for r in one.readings)]
        absent = [s for s in STAGES if s not in read]
        missing = f" Not read: {named_stages(absent)}." if absent else ""
        caption = (
            f"Calibrated log-odds of the truth against the answer given, at {named_stages(read)}; crosses: probes are at chance "
            f"there on held-out images.{missing}"
        )
        drawn = figures.way(_bounded(places), "Where the truth is known", "reads the truth", "reads the answer given")
        parts.append(figure(drawn, caption))
    return "".join(parts)


def _place(stage: str, layer: int) -> str:
    return stage if stage == "projector" else f"{stage} {layer}"


def _bounded(places: Sequence[tuple[str, float, str]], most: int = 40) -> list[tuple[str, float, str]]:
    """Thin out places of models with many layers, evenly."""
    keep = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))
    return [places[int(i)] for i in keep]
