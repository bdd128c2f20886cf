"""Compute POPE's figures from parsed answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from groundscope.core.short_repr import short_repr

# `import behavior` imports this module, so numpy is imported when scoring.
if TYPE_CHECKING:
    from groundscope.core.statistics import Estimate


@dataclass(frozen=True)
class PopeScores:
    """POPE's figures with ``yes`` as the positive class, with 95 % intervals clustered by image.

    An answer that is neither yes nor no is wrong and does not count as a predicted ``yes``: it lowers accuracy, and recall
    if the true answer is yes, but not precision. 0 / 0 is NaN. Two parsers treat such an answer as their release does
    (`unparsed` still counts it): ``pope_release`` counts it as yes; ``lmms_eval`` counts it as wrong in accuracy and
    excludes it from recall and F1, and its `yes_ratio` is the share of yes among the true answers.

    Examples
    --------
    >>> from behavior.pope import score
    >>> scores = score(["Yes.", "No.", "Yes."], ["yes", "no", "no"])
    >>> scores.n, scores.recall.value, scores.precision.value
    (3, 1.0, 0.5)
    """

    n: int
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    yes_ratio: Estimate
    """Share of yes among the model's answers (for ``lmms_eval``: among the true answers)."""
    unparsed: int
    """Answers that say neither yes nor no (`behavior.parsing.yes_no` for ``pope_release``, else the parser itself)."""
    splits: Mapping[str, PopeScores] = field(default_factory=dict)
    """The figures by split, if the question file has several splits."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    @property
    def mean_f1(self) -> float:
        """Mean of the splits' F1, as LLaVA reports it; the F1 itself if there is only one split."""
        parts = [part.f1.value for part in self.splits.values()] or [self.f1.value]
        return sum(parts) / len(parts)


def scores_of(
    parsed: Sequence[str | None], labels: Sequence[str], groups: Sequence[str | int], unparsed: int, parser: str = ""
) -> PopeScores:
    """Return the figures of parsed answers (``yes``, ``no`` or None) with their true answers and images."""
    from groundscope.core.statistics import estimate

    predicted_yes = [g == "yes" for g in parsed]
    lmms_eval = parser == "lmms_eval"
    true_yes = [label == "yes" and not (lmms_eval and g is None) for g, label in zip(parsed, labels, strict=True)]
    correct = [g == label for g, label in zip(parsed, labels, strict=True)]
    hits = [s and t for s, t in zip(predicted_yes, true_yes, strict=True)]
    return PopeScores(
        n=len(labels),
        accuracy=estimate(correct, groups),
        precision=estimate(hits, groups, predicted_yes),
        recall=estimate(hits, groups, true_yes),
        # 2 PR / (P + R) = 2 hits / (predicted yes + true yes), a ratio of totals.
        f1=estimate([2 * h for h in hits], groups, [s + t for s, t in zip(predicted_yes, true_yes, strict=True)]),
        yes_ratio=estimate([label == "yes" for label in labels] if lmms_eval else predicted_yes, groups),
        unparsed=unparsed,
    )
