"""The judge as a detector of wrong sentences: AUC and rank correlation with labels, and its text bias."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from groundscope.core.errors import DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, ratio
from groundscope.core.text import format_count
from mitigation.self_judgment.judge import Judgments

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
ALPHAS = (0.25, 0.5, 1.0, 2.0)
"""Weights of the text bias that `detect` compares."""


@dataclass(frozen=True)
class DetectorRow:
    """One score as a detector of true sentences, with 95 % intervals over images.

    Examples
    --------
    >>> from groundscope.core.statistics import Estimate
    >>> from mitigation.self_judgment import DetectorRow
    >>> DetectorRow("f", Estimate(0.9, 0.8, 1.0, 50), Estimate(1.0, 1.0, 1.0, 9), Estimate(0.7, 0.6, 0.8, 50)).score
    'f'
    """

    score: str
    """``f``, ``f_blind``, or ``S alpha=…``."""
    auc: Estimate
    """Probability that a true sentence has a larger score than a false one, over all sentences; ties count half."""
    auc_within: Estimate
    """The same over pairs of sentences about one image, which is what a choice among candidates needs; n is their number."""
    rank_correlation: Estimate
    """Spearman's correlation of the score with the label."""


@dataclass(frozen=True)
class DetectorResult:
    """The scores of a judge as detectors of true sentences.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.self_judgment import Judgments, detect
    >>> judgments = Judgments(np.array([2.0, 1.0, 3.0, 0.0]), np.array([0.5, 0.0, 1.0, 1.0]))
    >>> result = detect(judgments, [True, False, True, False], ["a", "a", "b", "b"])
    >>> result.rows[0].score, result.rows[0].auc.value, round(result.text_bias.value, 3)
    ('f', 1.0, 0.105)
    """

    rows: tuple[DetectorRow, ...]
    """f, f_blind, then S for each alpha."""
    text_bias: Estimate
    """Spearman's correlation of f with f_blind: how much of the score a model without the image has too."""

    __repr__ = short_repr

    def frame(self) -> pd.DataFrame:
        """Return one row per score, with the values and interval ends of each column."""
        import pandas as pd

        columns = ("auc", "auc_within", "rank_correlation")
        rows = []
        for row in self.rows:
            estimates = {name: getattr(row, name) for name in columns}
            cells = {f"{n}{end}": getattr(e, part) for n, e in estimates.items() for end, part in _ENDS.items()}
            rows.append({"score": row.score, **cells})
        return pd.DataFrame(rows)


_ENDS: Mapping[str, str] = {"": "value", " low": "low", " high": "high"}


def detect(
    judgments: Judgments,
    labels: ArrayLike,
    groups: Sequence[Hashable],
    *,
    alphas: Sequence[float] = ALPHAS,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> DetectorResult:
    """Compare the scores of sentences with labels of their truth.

    Parameters
    ----------
    judgments
        f and f_blind of each sentence, ``[n]``.
    labels
        Whether each sentence is true of its image, bool ``[n]``: by CHAIR, or by the known truth of scenes.
    groups
        The image of each sentence; intervals draw whole images.
    alphas
        Weights of the text bias in ``S = (1 + alpha) f - alpha f_blind``.
    resamples, confidence, seed
        Of the bootstrap (`groundscope.core.statistics.cluster_bootstrap`).

    Raises
    ------
    DataError
        If the lengths differ, or all labels are equal.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.self_judgment import Judgments, detect
    >>> judgments = Judgments(np.array([2.0, 1.0, 0.0, 3.0]), np.array([2.0, 0.0, 1.0, 1.0]))
    >>> result = detect(judgments, [True, False, False, True], ["a", "a", "b", "b"], alphas=[1.0])
    >>> [(row.score, row.auc.value) for row in result.rows]
    [('f', 1.0), ('f_blind', 0.875), ('S alpha=1', 0.875)]
    """
    truth = np.asarray(labels, dtype=bool)
    if not len(truth) == len(groups) == len(judgments.image):
        msg = (
            f"{format_count(len(judgments.image), 'judged sentence')}, {format_count(len(truth), 'label')} and "
            f"{format_count(len(groups), 'group')}: give one label and one group for each sentence"
        )
        raise DataError(msg)
    if truth.all() or not truth.any():
        msg = f"all {len(truth)} sentences have the label {bool(truth.any())}, so no score can separate two classes; add others"
        raise DataError(msg)
    names = list(dict.fromkeys(groups))
    number = {name: i for i, name in enumerate(names)}
    index = np.array([number[name] for name in groups])
    few = len(names) < FEW_GROUPS

    def interval(statistic: Callable[[Floats], Floats], lowest: float) -> Estimate:
        """Return a statistic of weights of sentences ``[draws, n]`` in ``[lowest, 1]``, with an interval over draws of images."""
        value = float(statistic(np.ones((1, len(truth))))[0])
        low, high = cluster_bootstrap(
            np.eye(len(truth)),  # totals of a draw are how often it contains each sentence
            index.tolist(),
            lambda totals, _: statistic(totals),
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        )
        return Estimate(value, *_clip(low, high, lowest), len(truth), few)

    def row(name: str, score: Floats) -> DetectorRow:
        wins, pairs = _pairs_within(score, truth, index)
        total = pairs.sum()
        low, high = cluster_bootstrap(
            np.column_stack([wins, pairs]),
            range(len(names)),
            ratio,
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        )
        within = Estimate(float(wins.sum() / total) if total else np.nan, *_clip(low, high, 0.0), int(total), few)
        return DetectorRow(
            name,
            interval(lambda weights: weighted_auc(score, truth, weights), 0.0),
            within,
            interval(lambda weights: weighted_rank_correlation(score, truth.astype(np.float64), weights), -1.0),
        )

    scores = {"f": judgments.image, "f_blind": judgments.blind}
    scores |= {f"S alpha={alpha:g}": judgments.debiased(alpha) for alpha in alphas}
    bias = interval(lambda weights: weighted_rank_correlation(judgments.image, judgments.blind, weights), -1.0)
    return DetectorResult(tuple(row(name, score) for name, score in scores.items()), bias)


def _clip(low: float, high: float, lowest: float) -> tuple[float, float]:
    """Return the ends of an interval within the range of its statistic; the correction for few images can pass it."""
    low, high = np.clip([low, high], lowest, 1.0)
    return float(low), float(high)


def weighted_auc(score: Floats, truth: NDArray[np.bool_], weights: Floats) -> Floats:
    """Return the area under the ROC curve for several weightings of the rows, ``[draws, n]`` -> ``[draws]``; NaN if undefined."""
    _, inverse = np.unique(score, return_inverse=True)
    true, false = (_by_value(weights * mask, inverse) for mask in (truth, ~truth))  # [draws, values]
    below = false.cumsum(1) - false
    pairs = true.sum(1) * false.sum(1)
    wins = (true * (below + false / 2)).sum(1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def weighted_rank_correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Return Spearman's correlation for several multiplicities of the rows, ``[draws, n]`` -> ``[draws]``; NaN if undefined."""
    a, b = (_mid_ranks(values, weights) for values in (x, y))
    total = weights.sum(1, keepdims=True)
    a, b = (ranks - (weights * ranks).sum(1, keepdims=True) / total for ranks in (a, b))
    scale = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    return np.divide((weights * a * b).sum(1), scale, out=np.full(len(weights), np.nan), where=scale > 0)


def _mid_ranks(values: Floats, weights: Floats) -> Floats:
    """Return the rank of each row among all rows repeated by their weights; the mean rank of equal ones."""
    _, inverse = np.unique(values, return_inverse=True)
    total = _by_value(weights, inverse)
    return (total.cumsum(1) - total + (total + 1) / 2)[:, inverse]


def _by_value(weights: Floats, inverse: NDArray[np.intp]) -> Floats:
    """Sum weights ``[draws, n]`` by the index of each row's value, ``[draws, values]``."""
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(int(inverse.max()) + 1))
    return np.add.reduceat(weights[:, order], starts, axis=1)


def _pairs_within(score: Floats, truth: NDArray[np.bool_], index: NDArray[np.int_]) -> tuple[Floats, Floats]:
    """Return for each group the pairs of a true and a false row whose true row has the larger score, and all such pairs."""
    wins, pairs = [], []
    for group in range(int(index.max()) + 1):
        true, false = score[(index == group) & truth], score[(index == group) & ~truth]
        difference = true[:, None] - false[None, :]
        wins.append(float((difference > 0).sum() + (difference == 0).sum() / 2))
        pairs.append(float(difference.size))
    return np.array(wins), np.array(pairs)
