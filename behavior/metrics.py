"""Metrics of a model's answers by name: accuracy by level and split, false positives, errors by prior, captions by CHAIR.

`METRICS` is an open table: `register` adds a metric, and so does an installed package with the entry-point group
``groundscope.behavior_metrics``. The names of the built-in metrics are stored in result files of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from behavior.chair import COCO_CATEGORIES, COCO_PHRASES, COCO_SYNONYMS, ChairResult, chair, score_captions
from behavior.comparison import change_estimate
from behavior.repeated_sampling import repeat_sampled
from behavior.result import Answer, BehaviorResult
from concepts.combination import dataset_parts
from concepts.nouns import canonical_noun
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset
from groundscope.core.registry import Registry
from groundscope.core.statistics import Estimate, estimate


@dataclass(frozen=True)
class BehaviorMetric:
    """A rate over some of the answers: an entry of `METRICS`.

    Examples
    --------
    >>> from behavior.metrics import METRICS
    >>> METRICS["present: says no"].lower_is_better
    True
    """

    applies: Callable[[Answer], bool]
    """Whether an answer belongs to the denominator."""
    counts: Callable[[Answer], bool]
    """Whether an answer to which the metric applies belongs to the numerator."""
    lower_is_better: bool = False


def _is_correct(answer: Answer) -> bool:
    return bool(answer.correct)


def _accuracy(split: str, level: str | None = None) -> BehaviorMetric:
    return BehaviorMetric(
        lambda a: a.split == split and a.correct is not None and level in {None, a.level}, _is_correct
    )


def _false_positives(split: str) -> BehaviorMetric:
    return BehaviorMetric(
        lambda a: a.split == split and a.kind == "existence" and a.answer == "no",
        lambda a: a.given == "yes",
        lower_is_better=True,
    )


def _problem(metric: BehaviorMetric) -> str | None:
    return None if isinstance(metric, BehaviorMetric) else "it must be a behavior.metrics.BehaviorMetric"


METRICS: Registry[BehaviorMetric] = Registry(
    "behavior metric",
    {
        "all: right": BehaviorMetric(lambda a: a.correct is not None, _is_correct),
        "neutral: right": _accuracy("neutral"),
        "neutral, object: right": _accuracy("neutral", "object"),
        "neutral, attribute: right": _accuracy("neutral", "attribute"),
        "neutral, relation: right": _accuracy("neutral", "relation"),
        "typical color: right": _accuracy("typical"),
        "random absent: says yes": _false_positives("random"),
        "popular absent: says yes": _false_positives("popular"),
        "adversarial absent: says yes": _false_positives("adversarial"),
        "conflict: wrong by prior": BehaviorMetric(
            lambda a: a.split == "conflict" and a.prior_answer is not None,
            lambda a: not a.correct and a.given == a.prior_answer,
            lower_is_better=True,
        ),
        "present: says no": BehaviorMetric(
            lambda a: a.split in {"random", "popular", "adversarial"} and a.answer == "yes",
            lambda a: a.given == "no",
            lower_is_better=True,
        ),
    },
    group="groundscope.behavior_metrics",
    check=_problem,
)
"""Metrics by name, in the order of tables and figures."""


def register(name: str, metric: BehaviorMetric, *, replace: bool = False) -> None:
    """Add a metric, for `compute_metrics` and for the evaluation of a run.

    An installed package does the same with an entry point in the group ``groundscope.behavior_metrics``.

    Parameters
    ----------
    name
        Name of the metric.
    metric
        The metric.
    replace
        Whether to replace an existing metric of that name.

    Raises
    ------
    ConfigError
        If the name is in use and `replace` is False, or `metric` is not a `BehaviorMetric`.

    Examples
    --------
    >>> import groundscope as gs
    >>> metrics = gs.behavior.metrics
    >>> metrics.register("yes ratio", metrics.BehaviorMetric(lambda a: "yes" in a.candidates, lambda a: a.given == "yes"))
    >>> list(metrics.METRICS)[-1]
    'yes ratio'
    >>> metrics.METRICS.unregister("yes ratio")
    """
    METRICS.register(name, metric, replace=replace)


def compute_metrics(
    answers: BehaviorResult, data: ConceptDataset, *, synonyms: Mapping[str, str] | None = None
) -> dict[str, Estimate]:
    """Compute every metric that applies to some answer, with 95 % intervals clustered by image; captions by CHAIR.

    Parameters
    ----------
    answers
        The answers.
    data
        The questions.
    synonyms
        Word or phrase to the object it means, for CHAIR on COCO; `behavior.chair.COCO_SYNONYMS` by default.

    Returns
    -------
    dict
        Name of a metric to its rate. Metrics of installed packages that cannot be loaded are missing; the log and
        ``METRICS.failures`` name them.

    Examples
    --------
    >>> import groundscope as gs
    >>> def answer_yes(number: int, truth: str) -> gs.Answer:
    ...     about = ("image", "neutral", "object", "existence", "Is there an apple?")
    ...     return gs.Answer(f"q{number}", *about, truth, ("yes", "no"), "yes", correct=truth == "yes")
    >>> rows = tuple(answer_yes(i, truth) for i, truth in enumerate(["yes", "yes", "no", "yes"]))
    >>> answers = gs.BehaviorResult(rows, gs.Cost(None, None, 4))
    >>> gs.compute_metrics(answers, gs.ConceptDataset("four questions", ()))["neutral, object: right"].value
    0.75
    """
    rates: dict[str, Estimate] = {}
    for name, metric in METRICS.usable().items():
        rows = [a for a in answers.answers if metric.applies(a)]
        if rows:
            rates[name] = estimate([metric.counts(a) for a in rows], [a.group for a in rows])
    data = repeat_sampled(
        data, int(answers.provenance.get("seeds", 1)), generate=bool(answers.provenance.get("generate"))
    )
    captions = {a.id: a for a in answers.answers if a.kind == "caption"}
    parts = {name: part for name, part in dataset_parts(data).items() if any(e.id in captions for e in part)}
    if captions and not parts:  # raises the error about captions that are not in the dataset
        parts = {data.name: data}
    for name, part in parts.items():
        ids = {e.id for e in part} if len(parts) > 1 else captions.keys()
        chosen = replace(answers, answers=tuple(a for id_, a in captions.items() if id_ in ids))
        scores = score_dataset_captions(chosen, part, synonyms=synonyms)
        # Each part has the vocabulary of its data, so the figures of several are not pooled.
        caption = f"{name}, caption" if len(parts) > 1 else "caption"
        rates[f"{caption}: invented of named (CHAIR_i)"] = scores.chair_i
        if "loader" in part.provenance:
            rates[f"{caption}: with something invented (CHAIR_s)"] = scores.chair_s
        rates[f"{caption}: named of shown (recall)"] = scores.recall
    return rates


def compare_metric(before: BehaviorResult, after: BehaviorResult, name: str) -> Estimate | None:
    """Return the change of a metric, after minus before, paired by question; None if the metric applies to no answer.

    Its 95 % interval is clustered by image.

    Parameters
    ----------
    before, after
        Answers to the same questions.
    name
        An entry of `METRICS`.

    Raises
    ------
    ConfigError
        For an unknown metric.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> about = ("image", "neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    >>> rows = [gs.Answer(f"q{i}", *about, "no", correct=False) for i in range(4)]
    >>> before = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 4))
    >>> corrected = replace(rows[0], given="yes", correct=True)
    >>> after = gs.BehaviorResult((corrected, *rows[1:]), gs.Cost(None, None, 4))
    >>> gs.compare_metric(before, after, "all: right").value
    0.25
    """
    metric = METRICS[name]
    row_after: dict[str, Answer] = {a.id: a for a in after.answers}
    rows = [a for a in before.answers if metric.applies(a)]
    if not rows:
        return None
    changes = np.array([int(metric.counts(row_after[a.id])) - int(metric.counts(a)) for a in rows])
    return change_estimate(changes, [a.group for a in rows])


def score_dataset_captions(
    answers: BehaviorResult, data: ConceptDataset, *, synonyms: Mapping[str, str] | None = None
) -> ChairResult:
    """Score the captions among answers with the vocabulary of their dataset.

    COCO captions are scored as by the released scorer, with COCO's categories, phrases and reference captions; captions of
    icon scenes with the nouns of the icons; all others with the annotated nouns and their synonyms. Only COCO scores are
    comparable with published figures, and only with the release's synonyms.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10)[:1]
    >>> about = (data[0].id, data[0].group, "neutral", "object", "caption", "Describe the image.", "", ())
    >>> text = " and ".join(o.noun for o in data[0].objects)
    >>> caption = gs.Answer(*about, given=None, correct=None, text=text)
    >>> answers = gs.BehaviorResult((caption,), gs.Cost(None, None, 1))
    >>> scores = gs.behavior.metrics.score_dataset_captions(answers, gs.ConceptDataset("one image", data))
    >>> scores.chair_i.value, scores.recall.value
    (0.0, 1.0)
    """
    loader = data.provenance.get("loader")
    if loader == "coco":
        words = COCO_SYNONYMS if synonyms is None else synonyms
        return score_captions(answers, data, words, vocabulary=COCO_CATEGORIES, phrases=COCO_PHRASES)
    if loader is not None:
        nouns = {o.noun for e in data for o in e.objects}
        return score_captions(answers, data, {noun: canonical_noun(noun) for noun in nouns}, variant="paper")
    texts = {a.id: a.text or "" for a in answers.answers if a.kind == "caption"}
    objects = {e.id: [o.noun for o in e.objects] for e in data if e.id in texts}
    return chair(texts, objects, vocabulary=NOUNS, variant="paper")
