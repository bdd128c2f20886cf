"""Measures of one row's answers, and their paired changes against the model alone.

A measure is a ratio of totals over answers: its numerator and denominator are counted for each answer, so that a rate, its
change on the same questions and their intervals come from one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from behavior.chair import ChairResult
from behavior.metrics import METRICS, score_dataset_captions
from behavior.parsing import YES_NO
from behavior.result import Answer, BehaviorResult
from concepts.schema import ConceptDataset
from groundscope.core.statistics import Estimate, changes_of_columns, cluster_bootstrap, estimate, ratio

Counts = Mapping[str, tuple[float, float]]
"""Id of an answer (without the number of its repetition) to its share of the numerator and of the denominator."""
CAPTION_INVENTED = "caption: invented of named (CHAIR_i)"
CAPTION_WITH_INVENTED = "caption: with something invented (CHAIR_s)"
CAPTION_RECALL = "caption: named of shown (recall)"
CAPTION_WORDS = "caption: words"
LOWER_IS_BETTER = frozenset({CAPTION_INVENTED, CAPTION_WITH_INVENTED})
"""Measures other than those of `behavior.metrics.METRICS` of which less is better."""
NEUTRAL = frozenset({CAPTION_WORDS})
"""Measures with no better direction; names that end with ``yes ratio`` too."""


@dataclass(frozen=True)
class Measure:
    """One measure of a row of the arena.

    Examples
    --------
    >>> from groundscope.core.statistics import Estimate
    >>> from mitigation.arena.measures import Measure
    >>> Measure("all: right", Estimate(0.9, 0.8, 1.0, 40)).change is None
    True
    """

    name: str
    value: Estimate
    """With its 95 % interval, clustered by image."""
    change: Estimate | None = None
    """Change against the model alone on the same questions; its interval holds for all methods together (see `changes`)."""
    spread: float | None = None
    """Standard deviation over seeds, of sampled answers; None for greedy ones."""


@dataclass(frozen=True)
class Counted:
    """The counts of every measure of one set of answers."""

    counts: Mapping[str, Counts]
    groups: Mapping[str, str]
    """Id of an answer to its image."""
    captions: Mapping[str, str] = field(default_factory=dict)
    """Text of each caption."""

    def values(self, name: str) -> np.ndarray:
        """Return the counts of a measure, ``[N, 2]``."""
        return np.array(list(self.counts[name].values()), dtype=np.float64).reshape(-1, 2)

    def images(self, name: str) -> list[str]:
        """Return the image of each count of a measure."""
        return [self.groups[key] for key in self.counts[name]]

    def estimate(self, name: str) -> Estimate:
        """Return a measure with its 95 % interval; a mean that is no rate has a bootstrap interval."""
        table, groups = self.values(name), self.images(name)
        if (table[:, 0] <= table[:, 1]).all():
            return estimate(table[:, 0], groups, table[:, 1])
        return _bootstrap(table, groups, lambda t, n: ratio(t, n), 0.95)


def count_answers(answers: BehaviorResult, data: ConceptDataset) -> Counted:
    """Return the counts of every measure that applies to the answers.

    The measures are those of `behavior.metrics.METRICS`; accuracy, precision, recall, F1 and share of yes for each split of
    yes-no questions (Li et al. 2023, arXiv 2305.10355); and for captions CHAIR (Rohrbach et al. 2018, arXiv 1809.02156),
    recall and words.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.arena.measures import count_answers
    >>> data = gs.scenes.dataset(10, splits=["conflict"])
    >>> counted = count_answers(gs.answer(gs.load_lvlm("tiny"), data), data)
    >>> "all: right" in counted.counts
    True
    """
    counts: dict[str, dict[str, tuple[float, float]]] = {}
    for name, metric in METRICS.usable().items():
        rows = {a.id: (float(metric.counts(a)), 1.0) for a in answers.answers if metric.applies(a)}
        if rows:
            counts[name] = rows
    splits = dict.fromkeys(a.split for a in answers.answers if set(a.candidates) == YES_NO)
    for split in splits:
        rows_of_split = [a for a in answers.answers if a.split == split and set(a.candidates) == YES_NO]
        if {a.answer for a in rows_of_split} != YES_NO:
            continue
        for measure, counted in _POPE.items():
            counts[f"{split}: {measure}"] = {a.id: counted(a) for a in rows_of_split}
    captions = {a.id: a.text or "" for a in answers.answers if a.kind == "caption"}
    if captions:
        counts |= _caption_counts(answers, data)
    return Counted(counts, {a.id: a.group for a in answers.answers}, captions)


def _precision(a: Answer) -> tuple[float, float]:
    return float(a.given == "yes" and a.answer == "yes"), float(a.given == "yes")


def _f1(a: Answer) -> tuple[float, float]:
    return 2.0 * (a.given == "yes" and a.answer == "yes"), float(a.given == "yes") + (a.answer == "yes")


_POPE: Mapping[str, Callable[[Answer], tuple[float, float]]] = {
    "accuracy": lambda a: (float(bool(a.correct)), 1.0),
    "precision": _precision,
    "recall": lambda a: (float(a.given == "yes" and a.answer == "yes"), float(a.answer == "yes")),
    "F1": _f1,
    "yes ratio": lambda a: (float(a.given == "yes"), 1.0),
}


def _caption_counts(answers: BehaviorResult, data: ConceptDataset) -> dict[str, dict[str, tuple[float, float]]]:
    captions = BehaviorResult(
        tuple(a for a in answers.answers if a.kind == "caption"), answers.cost, answers.provenance
    )
    words = {a.id: (float(len((a.text or "").split())), 1.0) for a in captions.answers}
    annotated = ConceptDataset(data.name, tuple(e for e in data if e.kind == "caption"), data.provenance)
    if not any(e.objects or e.answer for e in annotated):
        return {CAPTION_WORDS: words}
    return {**chair_counts(score_dataset_captions(captions, annotated)), CAPTION_WORDS: words}


def chair_counts(scores: ChairResult) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the counts of CHAIR_i, CHAIR_s and recall by caption."""

    def count(items: Sequence[str]) -> float:
        return float(len(items) if scores.variant == "release" else len(set(items)))

    sizes = {c.id: float(len(set(c.mentioned) - set(c.hallucinated)) + len(c.missed)) for c in scores.captions}
    return {
        CAPTION_INVENTED: {c.id: (count(c.hallucinated), count(c.mentioned)) for c in scores.captions},
        CAPTION_WITH_INVENTED: {c.id: (float(bool(c.hallucinated)), 1.0) for c in scores.captions},
        CAPTION_RECALL: {c.id: (sizes[c.id] - len(c.missed), sizes[c.id]) for c in scores.captions},
    }


def change(before: Counted, after: Counted, name: str, *, comparisons: int = 1) -> Estimate | None:
    """Return the change of a measure on the same questions, after minus before; None if it applies to neither.

    The interval is clustered by image and has confidence ``1 - 0.05 / comparisons`` (Bonferroni), so that the intervals of
    that many methods hold together with 95 %. Rates of single answers have the interval for changes
    (`groundscope.core.statistics.changes_of_columns`), other ratios that of the bootstrap over images.
    """
    if name not in before.counts and name not in after.counts:
        return None
    keys = list(dict.fromkeys([*before.counts.get(name, {}), *after.counts.get(name, {})]))
    groups = [before.groups.get(key) or after.groups[key] for key in keys]
    confidence = 1 - 0.05 / comparisons
    both = [np.array([side.counts.get(name, {}).get(key, (0.0, 0.0)) for key in keys]) for side in (before, after)]
    first, second = both
    if (first[:, 1] == 1).all() and (second[:, 1] == 1).all() and np.isin(np.concatenate(both)[:, 0], (0, 1)).all():
        moved = second[:, 0] - first[:, 0]
        low, high = changes_of_columns(moved, groups, confidence)
        return Estimate(float(moved.mean()), float(low), float(high), len(keys))
    return _bootstrap(
        np.column_stack([first, second]), groups, lambda t, n: ratio(t[:, 2:], n) - ratio(t[:, :2], n), confidence
    )


def _bootstrap(
    table: np.ndarray,
    groups: Sequence[Hashable],
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    confidence: float,
) -> Estimate:
    value = float(statistic(table.sum(axis=0)[None], np.array([float(len(table))]))[0])
    low, high = cluster_bootstrap(table, groups, statistic, confidence=confidence, resamples=2000)
    return Estimate(value, low, high, round(float(table[:, 1].sum())))


def improves(name: str, amount: Estimate) -> bool | None:
    """Whether a change is an improvement beyond its interval (True), a loss beyond it (False), or neither (None)."""
    if name in NEUTRAL or name.endswith("yes ratio") or not (math.isfinite(amount.low) and math.isfinite(amount.high)):
        return None
    sign = -1 if lower_is_better(name) else 1
    if sign * amount.low > 0 and sign * amount.high > 0:
        return True
    return False if sign * amount.low < 0 and sign * amount.high < 0 else None


def lower_is_better(name: str) -> bool:
    """Whether less of a measure is better."""
    return name in LOWER_IS_BETTER or (name in METRICS and METRICS[name].lower_is_better)
