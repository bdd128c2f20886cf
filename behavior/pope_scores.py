"""POPE's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

# `import behavior` imports this module, so numpy waits until something is scored.
if TYPE_CHECKING:
    from groundscope.core.statistics import Estimate


@dataclass(frozen=True)
class PopeScores:
    """POPE's figures, ``yes`` being the positive answer, with 95 % intervals clustered by image.

    An answer that is neither yes nor no is wrong, and no prediction of yes: it lowers accuracy, and recall where the
    truth is yes, but not precision. A figure that is 0 / 0 is NaN. Two parsers count such an answer as their release
    does, and it is still counted in `unparsed`: for ``pope_release`` it is a yes; for ``lmms_eval`` it is wrong in
    accuracy and left out of recall and F1, and `yes_ratio` is the share of yes among the true answers.
    """

    n: int
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    yes_ratio: Estimate
    """Share of yes among the answers given, not among the true ones (but see ``lmms_eval``)."""
    unparsed: int
    """Answers that say neither yes nor no (`behavior.parsing.yes_no` for ``pope_release``, else the parser itself)."""
    splits: Mapping[str, PopeScores] = field(default_factory=dict)
    """The same by split, where a question file has several."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    @property
    def mean_f1(self) -> float:
        """Mean of the F1 of the splits, LLaVA's headline; the F1 itself where there is one split only."""
        parts = [part.f1.value for part in self.splits.values()] or [self.f1.value]
        return sum(parts) / len(parts)


def scores_of(
    given: Sequence[str | None], labels: Sequence[str], groups: Sequence[str | int], unparsed: int, parser: str = ""
) -> PopeScores:
    """Return the figures of answers that were already read: ``yes``, ``no`` or None, with their true answers and images."""
    from groundscope.core.statistics import estimate

    said = [g == "yes" for g in given]
    lmms_eval = parser == "lmms_eval"
    true = [label == "yes" and not (lmms_eval and g is None) for g, label in zip(given, labels, strict=True)]
    right = [g == label for g, label in zip(given, labels, strict=True)]
    hits = [s and t for s, t in zip(said, true, strict=True)]
    return PopeScores(
        n=len(labels),
        accuracy=estimate(right, groups),
        precision=estimate(hits, groups, said),
        recall=estimate(hits, groups, true),
        # 2 PR / (P + R) = 2 hits / (said yes + truly yes), which is a ratio of totals.
        f1=estimate([2 * h for h in hits], groups, [s + t for s, t in zip(said, true, strict=True)]),
        yes_ratio=estimate([label == "yes" for label in labels] if lmms_eval else said, groups),
        unparsed=unparsed,
    )
