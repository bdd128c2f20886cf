"""The four questions, each answered in a few sentences with numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from concepts.concept import LEVELS
from diagnosis.results import VERDICTS
from experiments.report.derived import best_layer, color_readings, errors_by_prior
from experiments.report.figures import Point
from experiments.report.html import interval, paragraph, percent, section, text
from experiments.report.sections.accuracy import ERRORS
from experiments.report.sections.diagnoses import unread_stages
from experiments.results.run_files import RunFiles
from groundscope.core.text import format_count

if TYPE_CHECKING:
    from circuits import HeadScores
    from lvlm.sites import Head


def summary_section(run: RunFiles) -> str:
    """Return the section."""
    done = run.finished
    items = []
    if not {"probe", "patch", "diagnose", "steer"} & done and "evaluate" in done:
        items.append(("What does it answer?", _answers(run), "accuracy"))
    if "probe" in done:
        items.append(("Where is it known?", _knowledge(run), "known" if run.grids else "accuracy"))
    if "patch" in done:
        items.append(("What uses it?", _used(run), "used"))
    if {"probe", "diagnose"} <= done:
        items.append(("Why was it wrong?", _why(run), "why" if run.diagnoses is not None else "accuracy"))
    if {"steer", "evaluate"} <= done:
        items.append(("What corrects it?", _corrected(run), "corrected" if "after" in run.rates else "accuracy"))
    body = "".join(
        f'<li><strong><a href="#{link}">{text(question)}</a></strong>{text(answer)}</li>'
        for question, answer, link in items
    )
    note = paragraph("Brackets contain 95 % intervals over images.", soft=True)
    return section("summary", "Summary", f'<ul class="answers">{body}</ul>', note)


def _answers(run: RunFiles) -> str:
    right = run.rates["before"].get("all: right")
    questions = (
        f"{format_count(right.n, 'question')}: {interval(right)} right" if right is not None else "Captions only"
    )
    return f"{questions}. The other stages have not run: groundscope resume={run.root} runs them."


def _knowledge(run: RunFiles) -> str:
    if run.missing_probes and not run.grids:
        return f"No probe was fitted: {run.missing_probes}."
    read = [
        f"{level} {interval(best)} at {best.place} (shuffled labels {percent(best.control)})"
        for level in LEVELS
        if (best := best_layer(run, level, "last")) is not None
    ]
    if not read:
        return "No level had enough data for a probe at the last token."
    return f"Balanced accuracy of linear probes at the last token: {'; '.join(read)}."


def _used(run: RunFiles) -> str:
    if not run.head_scores:
        return "No head could be scored, because the images hardly change the answers."
    best = {kind: (scores, scores.top(1)[0]) for kind, scores in run.head_scores.items()}
    effects = "; ".join(f"{kind} {_effect(scores, head)} by {head}" for kind, (scores, head) in best.items())
    return f"Largest share of the answer that one head restores: {effects}. Every head was patched exactly."


def _effect(scores: HeadScores, head: Head) -> str:
    low, high = scores.interval()
    at = (head.layer, head.head)
    return interval(Point(float(scores.mean[at]), float(low[at]), float(high[at])))


def _why(run: RunFiles) -> str:
    sentences = [_errors_by_prior(run)]
    if run.diagnoses is not None:
        wrong = run.diagnoses.wrong
        counts = sorted(((sum(d.verdict == v for d in wrong), v) for v in VERDICTS), key=lambda item: -item[0])
        verdicts = ", ".join(f"{n} {verdict}" for n, verdict in counts if n)
        sentences += [
            f"Verdicts of {format_count(len(wrong), 'diagnosed wrong answer')}: {verdicts}.",
            *unread_stages(run.diagnoses),
        ]
    return " ".join(sentences)


def _errors_by_prior(run: RunFiles) -> str:
    """Return what probes read in the answers that follow the prior against the image."""
    if run.frame is None:
        return "The run folder has no activations, so answers by the prior cannot be examined."
    readings = color_readings(run)
    if readings:
        at_object = [r for r in readings if r.tokens == "object:mean"] or readings[:1]
        at_last = [r for r in readings if r.tokens == "last"] or readings[:1]
        object_best, last_best = (max(part, key=lambda r: r.true) for part in (at_object, at_last))
        n = readings[0].n
        if object_best.true <= 0.5:
            highest = percent(object_best.true)
            return f"In {format_count(n, 'answer')} by the prior, probes read the true color in at most {highest}."
        return (
            f"In {format_count(n, 'answer')} by the prior, probes read the true color at {object_best.place} (object tokens) "
            f"in {percent(object_best.true)} and at {last_best.place} (last token) in {percent(last_best.true)}: the model sees "
            "the color, and the answer does not use it."
        )
    errors = len(errors_by_prior(run))
    if errors:
        return (
            f"The prior decided {format_count(errors, 'answer')} against the image, but too few images show each color "
            "to fit probes of all colors."
        )
    return "No wrong answer of these data follows a known prior."


def _corrected(run: RunFiles) -> str:
    text = _best(run)
    if "exportable" not in run.rates:
        return text
    before, after = run.rates["before"], run.rates["exportable"]
    names = [name for name in ERRORS[:2] if name in before] or ["all: right"]
    changes = (f"{name}: {percent(before[name].value)} → {percent(after[name].value)}" for name in names)
    return f"{text} The vector for other software: {'; '.join(changes)}."


def _best(run: RunFiles) -> str:
    before, after = run.rates["before"], run.rates.get("after", run.rates["before"])
    if run.sweep["chosen"]["strength"]:
        changes = [
            f"{name}: {interval(before[name])} → {interval(after[name])}" for name in ERRORS[:2] if name in before
        ]
        guard = "neutral: right" if "neutral: right" in before else "all: right"
        changes.append(f"{guard}: {percent(before[guard].value)} → {percent(after[guard].value)}")
        return f"{'; '.join(changes)}. Controls of the same size are shown below."
    if run.sweep["curves"]:
        return "No strength of the vector reduced errors within the allowed cost, so the model is not steered."
    return f"No vector was derived: {'; '.join(run.sweep['left_out'].values()) or 'no head could be scored'}."
