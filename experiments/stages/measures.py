"""What a run reports of a model's answers: named measures, for any data that has their questions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from behavior import BehaviorResult
from behavior.chair import COCO_CATEGORIES, COCO_PHRASES, COCO_SYNONYMS, ChairResult, chair, score_captions
from behavior.result import Answer
from concepts.nouns import thing
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset
from groundscope.core.statistics import Estimate, estimate


@dataclass(frozen=True)
class Measure:
    """A rate over some of the answers."""

    counts: Callable[[Answer], bool]
    """Which answers it is about."""
    value: Callable[[Answer], bool]
    """What is counted."""
    error: bool
    """Whether less is better."""


def _right(answer: Answer) -> bool:
    return bool(answer.correct)


def _accuracy(split: str, level: str | None = None) -> Measure:
    return Measure(
        lambda a: a.split == split and a.correct is not None and level in {None, a.level}, _right, error=False
    )


def _false_positives(split: str) -> Measure:
    return Measure(
        lambda a: a.split == split and a.kind == "existence" and a.answer == "no",
        lambda a: a.given == "yes",
        error=True,
    )


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "all: right": Measure(lambda a: a.correct is not None, _right, error=False),
        "neutral: right": _accuracy("neutral"),
        "neutral, object: right": _accuracy("neutral", "object"),
        "neutral, attribute: right": _accuracy("neutral", "attribute"),
        "neutral, relation: right": _accuracy("neutral", "relation"),
        "typical color: right": _accuracy("typical"),
        "random absent: says yes": _false_positives("random"),
        "popular absent: says yes": _false_positives("popular"),
        "adversarial absent: says yes": _false_positives("adversarial"),
        "conflict: wrong by prior": Measure(
            lambda a: a.split == "conflict" and a.prior_answer is not None,
            lambda a: not a.correct and a.given == a.prior_answer,
            error=True,
        ),
        "present: says no": Measure(
            lambda a: a.split in {"random", "popular", "adversarial"} and a.answer == "yes",
            lambda a: a.given == "no",
            error=True,
        ),
    }
)
"""Name to measure, in the order of tables and figures."""


PRIOR_ERRORS = ("conflict: wrong by prior", "adversarial absent: says yes")
"""The errors a correction is for; where the data have neither, all wrong answers count."""
GUARDS = ("neutral: right", "typical color: right")
"""What a correction must not cost."""
RECALL_GUARD = "present: says no"
"""What it must not cost where the data have none of `GUARDS`: objects that are there. Without it a strength at which every answer
is no would make the fewest errors on questions about absent objects."""


def harm(found: Mapping[str, Estimate]) -> float:
    """Return the mean of the errors a correction is for."""
    present = [found[name].value for name in PRIOR_ERRORS if name in found]
    return sum(present) / len(present) if present else 1 - found["all: right"].value


def guards(found: Collection[str]) -> tuple[str, ...]:
    """Return the measures that a correction must not make worse; empty where the data have nothing to guard."""
    names = tuple(name for name in GUARDS if name in found)
    return names or ((RECALL_GUARD,) if RECALL_GUARD in found else ())


def cost(found: Mapping[str, Estimate], before: Mapping[str, Estimate]) -> float:
    """Return the largest loss among what a correction must not cost (`guards`); 0 where the data have nothing to guard."""
    losses = [(found[name].value - before[name].value) * (1 if MEASURES[name].error else -1) for name in guards(found)]
    return max(losses, default=0.0)


def measured(
    result: BehaviorResult, data: ConceptDataset, synonyms: Mapping[str, str] | None = None
) -> dict[str, Estimate]:
    """Return every measure that has answers, with intervals clustered by image; captions by CHAIR.

    Parameters
    ----------
    result, data
        Answers, and what was asked.
    synonyms
        Words for the objects of COCO's captions, `behavior.chair.COCO_SYNONYMS` by default.
    """
    found: dict[str, Estimate] = {}
    for name, measure in MEASURES.items():
        kept = [a for a in result.answers if measure.counts(a)]
        if kept:
            found[name] = estimate([measure.value(a) for a in kept], [a.group for a in kept])
    if any(a.kind == "caption" for a in result.answers):
        scores = caption_scores(result, data, synonyms)
        found["caption: invented of named (CHAIR_i)"] = scores.chair_i
        if "loader" in data.provenance:
            found["caption: with something invented (CHAIR_s)"] = scores.chair_s
        found["caption: named of shown (recall)"] = scores.recall
    return found


def caption_scores(
    result: BehaviorResult, data: ConceptDataset, synonyms: Mapping[str, str] | None = None
) -> ChairResult:
    """Score the captions among answers, with the words that their data have.

    Captions of COCO are scored as by the released scorer, with COCO's categories, pairs of words and captions of people; those
    of scenes with the nouns of the icons; any other with the annotated nouns and their synonyms. Only the first is comparable
    with published figures, and only with the synonyms of the release.
    """
    loader = data.provenance.get("loader")
    if loader == "coco":
        words = COCO_SYNONYMS if synonyms is None else synonyms
        return score_captions(result, data, words, vocabulary=COCO_CATEGORIES, phrases=COCO_PHRASES)
    if loader is not None:
        nouns = {o.noun for e in data for o in e.objects}
        return score_captions(result, data, {noun: thing(noun) for noun in nouns}, variant="paper")
    texts = {a.id: a.text or "" for a in result.answers if a.kind == "caption"}
    objects = {e.id: [o.noun for o in e.objects] for e in data if e.id in texts}
    return chair(texts, objects, vocabulary=NOUNS, variant="paper")
