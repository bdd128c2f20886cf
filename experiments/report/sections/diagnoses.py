"""Why answers are wrong: verdicts by level and split, and some answers in detail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from diagnosis.narrative import named_stages, tokens_read, verdict_of
from diagnosis.results import (
    LOST,
    NOT_INTEGRATED,
    NOT_SEEN,
    OVERRIDDEN,
    OVERRIDDEN_LATE,
    SOURCES,
    STAGES,
    UNEXPLAINED,
    VERDICTS,
    Diagnoses,
    Diagnosis,
    kind_of,
)
from experiments.report import figures
from experiments.report.html import (
    example_block,
    figure,
    missing_illustrations,
    paragraph,
    section,
    table,
    term_list,
    text,
)
from experiments.results.illustrations import Illustration
from experiments.results.run_files import RunFiles
from experiments.results.selection import detailed_diagnoses
from groundscope.core.statistics import estimate
from groundscope.core.text import format_count

MEANINGS: Mapping[str, str] = {
    "not seen": "the probe in the vision tower reads another answer or is at chance, and no later probe reads the truth",
    "lost at the projector": "the vision tower reads the truth; the projector and everything after it do not",
    "not integrated": "image tokens read the truth; the last token, from which the answer is read, does not",
    "overridden by the prior": "the last token reads the truth, and the answer is right without the contributions that push "
    "another answer (a common offset of such answers, or heads and MLPs); about blank images the words alone favor the wrong "
    "answer over the true one, and more than the image does",
    "overridden late": "the same, but about blank images the words alone favor the true answer, or the wrong one less than "
    "the image does",
    "not readable": "the deciding stage has no probe of the concept, or a probe that is not accurate enough to show its presence "
    "or absence; nothing is said about what the model encodes there",
    "other": "none of these; the reason is stated",
}
_MAX_MISSING = 30
"""Largest number of concepts without a probe that are listed."""
_MAX_PLACES = 40
"""Largest number of places in a figure."""


def diagnoses_section(run: RunFiles) -> str:
    """Return the section; with the reason if no answer was diagnosed, and empty if the stage was not run."""
    diagnoses, title = run.diagnoses, "Why it was wrong"
    if diagnoses is None:
        return section("why", title, paragraph(run.missing_diagnoses)) if run.missing_diagnoses else ""
    illustrations = run.illustrations("diagnosis")
    return section(
        "why",
        title,
        paragraph(
            f"{format_count(len(diagnoses.wrong), 'wrong answer')} to discovery questions, on images that no probe was "
            "fitted to. Each verdict names the last place where a probe reads the truth. Shares have 95 % intervals "
            "over images."
        ),
        *(
            paragraph(sentence)
            for sentence in (*without_cause(diagnoses), *readings_used(diagnoses), *unread_stages(diagnoses))
        ),
        term_list(MEANINGS),
        table(["level", "split", "wrong", *VERDICTS], _shares(diagnoses)),
        *_missing_probes(diagnoses),
        paragraph(
            "The parts that override the truth are identified by patching: the output of each head and MLP at the last token is "
            "replaced by its mean over right answers to questions of the same kind. Parts that right answers need too are "
            "excluded.",
            soft=True,
        ),
        missing_illustrations(illustrations, run, "diagnose"),
        *(
            _detail(diagnoses, diagnoses.examples.index(d), (illustrations or {}).get(d.example["id"]))
            for d in detailed_diagnoses(diagnoses, run.config.diagnose.shown)
        ),
        stages=("trace", "diagnose"),
    )


def without_cause(diagnoses: Diagnoses) -> list[str]:
    """Return a sentence on the answers whose verdict names no cause, and one on probes of other data."""
    sentences = []
    counts = {verdict: sum(d.verdict == verdict for d in diagnoses.wrong) for verdict in UNEXPLAINED}
    if total := sum(counts.values()):
        named = " and ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
        sentences.append(f"Without a cause: {total} of {format_count(len(diagnoses.wrong), 'answer')} ({named}).")
    if fitted_to := diagnoses.provenance.get("fitted_to"):
        sentences.append(
            f"Probes were fitted to other data, {fitted_to}; images that the run's data also have were left out."
        )
    return sentences


def _shown_kind(diagnosis: Diagnosis) -> str:
    """Return level and kind of a question, once if they are equal."""
    return " ".join(dict.fromkeys(kind_of(diagnosis).split(" ")))


def readings_used(diagnoses: Diagnoses) -> list[str]:
    """Return a sentence for each kind of question without boxes, which says where its image was read instead."""
    kinds: dict[tuple[str, str], int] = {}
    for diagnosis in diagnoses.wrong:
        if tokens := tokens_read(diagnosis):
            key = (_shown_kind(diagnosis), tokens)
            kinds[key] = kinds.get(key, 0) + 1
    return [
        f"Without boxes, images were read at {tokens} for {format_count(count, 'answer')} of kind {kind}."
        for (kind, tokens), count in kinds.items()
    ]


def unread_stages(diagnoses: Diagnoses) -> list[str]:
    """Return for each kind of question the stages that no probe reads in any wrong answer, and the verdicts this excludes."""
    kinds: dict[str, list[Diagnosis]] = {}
    for diagnosis in diagnoses.wrong:
        kinds.setdefault(_shown_kind(diagnosis), []).append(diagnosis)
    groups: dict[tuple[str, ...], list[str]] = {}
    for kind, part in kinds.items():
        missing = tuple(stage for stage in STAGES if all(stage in d.unread for d in part))
        groups.setdefault(missing, []).append(f"{kind} ({len(part)})")
    sentences = []
    for missing, names in groups.items():
        excluded = [verdict for verdict, possible in _possible_verdicts(missing).items() if not possible]
        if missing:
            consequence = f" This excludes the verdicts {', '.join(excluded)}." if excluded else ""
            sentences.append(
                f"No readable probe at {named_stages(missing)} for wrong answers of kind {', '.join(names)}.{consequence}"
            )
    return sentences


def _possible_verdicts(missing: Sequence[str]) -> dict[str, bool]:
    """Return whether each verdict is possible if some stages have no probe."""
    read = {stage: stage not in missing for stage in STAGES}
    between = read["projector"] or read["image"]
    return {
        NOT_SEEN: read["vision"],
        LOST: read["vision"] and between,
        NOT_INTEGRATED: between and read["last"],
        OVERRIDDEN: read["last"],
        OVERRIDDEN_LATE: read["last"],
    }


def _missing_probes(diagnoses: Diagnoses) -> list[str]:
    """Return the concepts that have no probe at some place."""
    names = sorted(diagnoses.provenance.get("left_out", {}))
    if not names:
        return []
    more = f" and {len(names) - _MAX_MISSING} more" if len(names) > _MAX_MISSING else ""
    return [paragraph(f"Too few images for a probe at some place: {', '.join(names[:_MAX_MISSING])}{more}.", soft=True)]


def _shares(diagnoses: Diagnoses) -> list[list[str]]:
    """Return a row for each level and split, with the share of each verdict."""
    keys = sorted({(d.example["level"], d.example["split"]) for d in diagnoses.wrong})
    rows = []
    for level, split in [*keys, ("all", "")]:
        part = [
            d for d in diagnoses.wrong if level == "all" or (d.example["level"], d.example["split"]) == (level, split)
        ]
        cells = []
        for verdict in VERDICTS:
            share = estimate([d.verdict == verdict for d in part], [d.example["group"] for d in part])
            count = sum(d.verdict == verdict for d in part)
            cells.append(
                f"{100 * share.value:.0f}\u00a0% [{100 * share.low:.0f},\u00a0{100 * share.high:.0f}]" if count else "-"
            )
        rows.append([level, split, str(len(part)), *cells])
    return rows


def _detail(diagnoses: Diagnoses, index: int, illustration: Illustration | None) -> str:
    """Return the block of one answer: image, facts, explanation, and the readings along the forward pass."""
    diagnosis = diagnoses[index]
    question, truth = diagnosis.example["question"], diagnosis.example["truth"]
    parts = [
        f"<h3>{text(question)} “{text(diagnosis.model_answer)}”</h3>",
        example_block(_facts(diagnosis), illustration, f"{question} {truth}"),
        paragraph(diagnoses.text(index)),
    ]
    # One selection of tokens for each stage: the one that the verdict uses. Earlier versions do not say which.
    used = {(r.stage, r.tokens) for r in diagnosis.readings if r.used}
    readings = [r for r in diagnosis.readings if not used or (r.stage, r.tokens) in used]
    places = [(_place(r.stage, r.layer), r.log_odds, r.state) for r in readings]
    if any(not math.isnan(log_odds) for _, log_odds, _ in places):
        read = [s for s in STAGES if any(r.stage == s and not math.isnan(r.log_odds) for r in readings)]
        absent = [s for s in STAGES if s not in read]
        missing = f" Not read: {named_stages(absent)}." if absent else ""
        plot = figures.way(_thin(places), "Where the truth is read", "reads the truth", "reads the wrong answer")
        caption = (
            f"Calibrated log-odds of the truth against the wrong answer, at {named_stages(read)}. Crosses: probes at chance on "
            f"held-out images.{missing}"
        )
        parts.append(figure(plot, caption))
    return "".join(parts)


def _facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    facts = [
        ("question", diagnosis.example["question"]),
        ("answer of the model", diagnosis.model_answer),
        ("true answer", diagnosis.example["truth"]),
        ("verdict", verdict_of(diagnosis)),
        ("answer without the image", diagnosis.without_image),
    ]
    offset_only = diagnosis.offset > 0 and not diagnosis.corrected_by
    if diagnosis.pushes and not offset_only:
        pushes = ", ".join(f"{p.part} ({p.effect:+.2f})" for p in diagnosis.pushes[:3])
        facts.append(("parts that push the answer (effect of replacing them)", pushes))
    if offset_only:
        facts.append(
            ("without the common offset", f"right: such answers have an offset of {diagnosis.offset:.1f} logits")
        )
    elif diagnosis.corrected_by:
        offset = f" and the common offset of {diagnosis.offset:.1f} logits" if diagnosis.offset > 0 else ""
        change = f"log-odds {diagnosis.log_odds:+.2f} → {diagnosis.corrected_log_odds:+.2f}"
        facts.append(("corrected without", f"{', '.join(diagnosis.corrected_by)}{offset}: {change}"))
    if diagnosis.sources:
        shares = ", ".join(f"{name} {diagnosis.sources[name]:+.2f}" for name in SOURCES)
        facts.append(("log-odds of the true answer", f"{diagnosis.sources['log_odds']:+.2f} = {shares}"))
        if "no_image" in diagnosis.sources:
            facts.append(("the same without any image", f"{diagnosis.sources['no_image']:+.2f}"))
    return facts


def _place(stage: str, layer: int) -> str:
    return stage if stage == "projector" else f"{stage} {layer}"


def _thin(places: Sequence[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    """Return evenly spaced places of a model with many layers."""
    keep = np.unique(np.linspace(0, len(places) - 1, min(_MAX_PLACES, len(places))).round().astype(int))
    return [places[int(i)] for i in keep]
