"""Calibrate margins as log-odds: slope, threshold, and whether a place is readable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.intervals import combined_interval
from groundscope.core.statistics import group_totals, relative_variance

ERROR_SHARE = 0.05
"""Share of right answers that may be beyond the threshold on the wrong side."""
MIN_ACCURACY = 0.6
"""Smallest held-out accuracy of a readable place, whatever its interval."""
MIN_EXAMPLES = 15
"""Smallest number of held-out examples for a calibration."""


@dataclass(frozen=True)
class Calibration:
    """Conversion of margins at a place to log-odds."""

    n: int
    accuracy: float
    low: float
    high: float
    slope: float
    offset: float
    """Added for truths of class 1, subtracted for class 0."""
    threshold: float
    readable: bool

    def log_odds(self, margin: float, side: float) -> float:
        """Return the log-odds of the truth for a margin and a class (1 or 0)."""
        return self.slope * margin + self.offset * (1 if side else -1)

    def reads(self, values: np.ndarray, side: float) -> float:
        """Return the share of rivals against which the truth is decoded; without a slope, by the sign of the margins."""
        return float(((self.slope or 1.0) * values + (self.offset if side else -self.offset) > 0).mean())


def calibrate(
    values: Sequence[np.ndarray], sides: np.ndarray, groups: Sequence[str], right: np.ndarray, places: int
) -> Calibration:
    """Fit slope and offset on all held-out examples, and the threshold on those that the model answers correctly.

    Parameters
    ----------
    values
        Margins of the truth against each rival, for each example.
    sides
        ``[n]``, as in `Margins.classes`; both classes have equal weight.
    groups
        Group of each example.
    right
        bool ``[n]``: whether the model's answer is right.
    places
        Number of places of the stage. The lower end of the interval of each is widened by it (Bonferroni), because any place
        above chance makes the stage readable. The upper end is not: the place that shows absence is chosen by its validation
        accuracy on the training folds, not on these examples.

    Returns
    -------
    Calibration
        The logistic fit has one additional example of each class with mean margin and the wrong decision, so log-odds are
        finite even if all decisions are right (rule of succession).
    """
    n = len(values)
    if n < MIN_EXAMPLES:
        nan = float("nan")
        return Calibration(n, nan, nan, nan, 0.0, 0.0, 0.0, readable=False)
    mean = np.array([v.mean() for v in values])
    two = len(set(sides.tolist())) == 2
    weight = np.full(n, 1 / n)
    if two:
        weight = np.where(sides == 1, 0.5 / (sides == 1).sum(), 0.5 / (sides == 0).sum())
    # Rivals of one example share its weight.
    margin = np.concatenate(list(values))
    share = np.concatenate([np.full(len(v), w / len(v)) for v, w in zip(values, weight, strict=True)])
    side = np.concatenate([np.full(len(v), 1.0 if s else -1.0) for v, s in zip(values, sides, strict=True)])
    slope, offset = _platt(margin, side if two else np.zeros(len(margin)), share, n)
    # Without a slope, the sign of the margins decides.
    k = slope or 1.0
    read = np.array([(k * v + (offset if s else -offset) > 0).mean() for v, s in zip(values, sides, strict=True)])
    accuracy = float((weight * read).sum())
    low, _ = _accuracy_interval(read, sides, groups, 1 - ERROR_SHARE / max(1, places))
    _, high = _accuracy_interval(read, sides, groups, 1 - ERROR_SHARE)
    odds = slope * mean + offset * np.where(sides == 1, 1, -1)
    edge = _lower_bound(odds[right] if right.sum() >= MIN_EXAMPLES else odds)
    # A bound above 0 needs no threshold; below 0, its size is the range of the noise.
    return Calibration(
        n, accuracy, low, high, slope, offset, max(0.0, -edge), readable=bool(low > 0.5 and accuracy >= MIN_ACCURACY)
    )


def _lower_bound(odds: np.ndarray) -> float:
    """Return the value that new log-odds are below with probability `ERROR_SHARE` at most, if they are exchangeable with `odds`.

    The k-th smallest of n values is above a new one with probability k / (n + 1) at most (split conformal prediction:
    Papadopoulos et al. 2002; Vovk et al. 2005). The sample's own quantile would be exceeded more often: by 1 in 13 of 30 values.
    Of fewer than 19 values it is the smallest, with probability 1 / (n + 1).
    """
    k = math.floor(ERROR_SHARE * (len(odds) + 1) + 1e-9)
    return float(np.sort(odds)[max(k, 1) - 1])


def _accuracy_interval(
    read: np.ndarray, sides: np.ndarray, groups: Sequence[str], confidence: float
) -> tuple[float, float]:
    """Return the interval, clustered by group, of the mean accuracy over classes."""
    names = sorted(set(sides.tolist()))
    parts = [sides == name for name in names]
    columns = [column for part in parts for column in (part * read, part * 1.0)]
    totals = group_totals(np.column_stack(columns), groups).T  # [2 sides, G]
    spreads = [
        relative_variance(read[part], int(np.count_nonzero(t))) for part, t in zip(parts, totals[1::2], strict=True)
    ]
    low, high = combined_interval(
        totals[::2], totals[1::2], np.full(len(names), 1 / len(names)), confidence, spread=spreads
    )
    return float(low), float(high)


def _platt(margin: np.ndarray, side: np.ndarray, weight: np.ndarray, n: int) -> tuple[float, float]:
    """Return slope >= 0 and offset of the logistic fit of right decisions, by Newton's method with step halving."""
    scale = float(np.abs(margin).mean()) or 1.0
    sides = sorted(set(side.tolist()))
    # One additional example of each class, decided wrongly with a typical margin.
    m = np.concatenate([margin / scale, np.full(len(sides), -1.0)])
    s = np.concatenate([side, np.array(sides)])
    w = np.concatenate([weight * n, np.ones(len(sides))])
    x = np.column_stack([m, s])
    at = np.zeros(2)

    def loss(b: np.ndarray) -> float:
        # A weak penalty on the offset, so that it exists if a class has no example.
        return float((w * np.logaddexp(0, -(x @ b))).sum() + 0.05 * b[1] ** 2)

    for _ in range(100):
        wrong = 1 / (1 + np.exp(np.clip(x @ at, -500, 500)))
        gradient = -(x * (w * wrong)[:, None]).sum(0) + np.array([0, 0.1 * at[1]])
        curve = (x * (w * wrong * (1 - wrong))[:, None]).T @ x + np.diag([1e-9, 0.1])
        step = np.linalg.solve(curve, gradient)
        size = 1.0
        while loss(at - size * step) > loss(at) and size > 1e-6:
            size /= 2
        at = at - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    if at[0] <= 0:
        return 0.0, 0.0
    return float(at[0]) / scale, float(at[1])
