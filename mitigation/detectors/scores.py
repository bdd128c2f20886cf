"""Scores of mentioned objects, and their area under the ROC curve with intervals over images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from groundscope.core.errors import DataError
from groundscope.core.statistics import FEW_GROUPS, Estimate
from groundscope.core.text import nearest
from probes.protocol.scoring import auc, weighted_auc

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class MentionScores:
    """Scores of a detector, one row for each mentioned object.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.detectors.scores import MentionScores
    >>> groups = tuple(f"image {i}" for i in range(4))
    >>> wrong = np.array([1.0, 0.0, 1.0, 0.0])
    >>> scores = MentionScores(groups, groups, ("dog",) * 4, wrong, {"uncertainty": np.array([3.0, 1.0, 2.0, 2.5])})
    >>> scores.auc("uncertainty").value
    0.75
    """

    ids: tuple[str, ...]
    """Id of each row's example."""
    groups: tuple[str, ...]
    """Image of each row."""
    nouns: tuple[str, ...]
    hallucinated: np.ndarray
    """float64 ``[N]``: 1 for an object that is not in the image, 0 for one that is, NaN if unknown."""
    values: Mapping[str, np.ndarray]
    """Name to score, float64 ``[N]``; NaN where a score is not defined."""

    def __post_init__(self) -> None:
        values = {name: np.asarray(x, np.float64) for name, x in self.values.items()}
        labels = np.asarray(self.hallucinated, np.float64)
        sizes = {len(self.ids), len(self.groups), len(self.nouns), len(labels), *(len(x) for x in values.values())}
        if len(sizes) > 1:
            msg = f"columns of {sorted(sizes)} rows: every score must have one value for each mentioned object"
            raise DataError(msg)
        for array in (labels, *values.values()):
            array.setflags(write=False)
        object.__setattr__(self, "hallucinated", labels)
        object.__setattr__(self, "values", MappingProxyType(values))

    def __len__(self) -> int:
        return len(self.ids)

    def matrix(self) -> np.ndarray:
        """Return all scores as columns, float64 ``[N, scores]``."""
        return np.column_stack([*self.values.values()])

    def auc(self, name: str, *, resamples: int = RESAMPLES, confidence: float = 0.95, seed: int = 0) -> Estimate:
        """Return the area under the ROC curve of a score for hallucinated objects, with an interval over images.

        Rows without a label or without the score are left out; the interval is that of a bootstrap of whole images
        (percentiles).

        Raises
        ------
        DataError
            For an unknown score.
        """
        if name not in self.values:
            msg = f"unknown score '{name}'; choose from {', '.join(self.values)}{nearest(name, tuple(self.values))}"
            raise DataError(msg)
        return grouped_auc(
            self.hallucinated, self.values[name], self.groups, resamples=resamples, confidence=confidence, seed=seed
        )


def grouped_auc(
    labels: np.ndarray,
    scores: np.ndarray,
    groups: tuple[str, ...],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the area under the ROC curve with an interval clustered by group; rows with NaN are excluded."""
    defined = ~np.isnan(labels) & ~np.isnan(scores)
    y, x = labels[defined], scores[defined]
    names, row_group = np.unique(np.asarray(groups, dtype=object)[defined].astype(str), return_inverse=True)
    if len(set(y.tolist())) < 2:
        return Estimate(float("nan"), float("nan"), float("nan"), len(y), few_groups=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    draws = weighted_auc(y, x, counts[:, row_group].astype(np.float64))
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Estimate(auc(y, x), float(low), float(high), len(y), few_groups=len(names) < FEW_GROUPS)
