"""Named rates of a model's answers: accuracy by level and split, errors by prior, false positives, hallucinated captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from behavior.chair import COCO_CATEGORIES, COCO_PHRASES, COCO_SYNONYMS, ChairResult, chair, score_captions
from behavior.comparison import change_estimate
from behavior.result import Answer, BehaviorResult
from concepts.nouns import thing
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset
from groundscope.core.statistics import Estimate, estimate


@dataclass(frozen=True)
class Measure:
    """A rate over some of the answers, an entry of `MEASURES`.

    Examples
    --------
    >>> from behavior.measures import MEASURES
    >>> MEASURES["present: says no"].error
    True
    """

    counts: Callable[[Answer], bool]
    """Whether an answer belongs to the denominator."""
    value: Callable[[Answer], bool]
    """Whether an answer belongs to the numerator."""
    error: bool
    """Whether lower is better."""


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
"""Measures by name, in the order of tables and figures."""


def measure(
    result: BehaviorResult, data: ConceptDataset, synonyms: Mapping[str, str] | None = None
) -> dict[str, Estimate]:
    """Return every measure that applies to some answer, with intervals clustered by image; captions are scored with CHAIR.

    Parameters
    ----------
    result
        The answers.
    data
        The questions.
    synonyms
        Words for the objects of COCO's captions; `behavior.chair.COCO_SYNONYMS` by default.

    Examples
    --------
    >>> from behavior import Answer, BehaviorResult, Cost
    >>> from concepts import ConceptDataset
    >>> def answer_yes(number: int, truth: str) -> Answer:
    ...     about = ("image", "neutral", "object", "existence", "Is there an apple?")
    ...     return Answer(f"q{number}", *about, truth, ("yes", "no"), "yes", correct=truth == "yes")
    >>> answers = tuple(answer_yes(i, truth) for i, truth in enumerate(["yes", "yes", "no", "yes"]))
    >>> rates = measure(BehaviorResult(answers, Cost(None, None, 4)), ConceptDataset("four questions", ()))
    >>> rates["neutral, object: right"].value
    0.75
    """
    rates: dict[str, Estimate] = {}
    for name, item in MEASURES.items():
        answers = [a for a in result.answers if item.counts(a)]
        if answers:
            rates[name] = estimate([item.value(a) for a in answers], [a.group for a in answers])
    if any(a.kind == "caption" for a in result.answers):
        scores = score_dataset_captions(result, data, synonyms)
        rates["caption: invented of named (CHAIR_i)"] = scores.chair_i
        if "loader" in data.provenance:
            rates["caption: with something invented (CHAIR_s)"] = scores.chair_s
        rates["caption: named of shown (recall)"] = scores.recall
    return rates


def measure_change(before: BehaviorResult, after: BehaviorResult, name: str) -> Estimate | None:
    """Return the paired change of a measure with an interval clustered by image; None if it applies to no answer.

    Parameters
    ----------
    before, after
        Answers to the same questions.
    name
        One of `MEASURES`.
    """
    item = MEASURES[name]
    later: dict[str, Answer] = {a.id: a for a in after.answers}
    answers = [a for a in before.answers if item.counts(a)]
    if not answers:
        return None
    changes = np.array([int(item.value(later[a.id])) - int(item.value(a)) for a in answers])
    return change_estimate(changes, [a.group for a in answers])


def score_dataset_captions(
    result: BehaviorResult, data: ConceptDataset, synonyms: Mapping[str, str] | None = None
) -> ChairResult:
    """Score the captions among answers with the vocabulary of their dataset.

    COCO captions are scored as by the released scorer, with COCO's categories, phrases and reference captions; captions of
    icon scenes with the nouns of the icons; all others with the annotated nouns and their synonyms. Only COCO scores are
    comparable with published figures, and only with the release's synonyms.
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
