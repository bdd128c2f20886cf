"""From margins to log-odds that can be believed: slopes, thresholds and whether a place can be read at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.intervals import combined_interval
from groundscope.core.statistics import group_totals, relative_variance

TAIL = 0.05
"""Share of right answers that may fall beyond a threshold on the wrong side."""
LEAST = 0.6
"""Accuracy on held-out examples below which a place counts as unreadable, whatever its interval."""
FEWEST = 15
"""Held-out examples without which nothing is said of a place."""


@dataclass(frozen=True)
class Calibration:
    """How margins at a place become log-odds."""

    n: int
    accuracy: float
    low: float
    high: float
    slope: float
    offset: float
    """Added for truths of one side, taken away for those of the other."""
    threshold: float
    readable: bool

    def log_odds(self, margin: float, side: float) -> float:
        """Return the log-odds of the truth for a margin on a side (1 or 0)."""
        return self.slope * margin + self.offset * (1 if side else -1)

    def reads(self, values: np.ndarray, side: float) -> float:
        """Return the share of rivals against which the truth is read; without a slope by the sign of the margins."""
        return float(((self.slope or 1.0) * values + (self.offset if side else -self.offset) > 0).mean())


def calibrate(
    values: Sequence[np.ndarray], sides: np.ndarray, groups: Sequence[str], right: np.ndarray, places: int
) -> Calibration:
    """Fit slope and offset on all held-out examples, the threshold on those that the model answers right.

    Parameters
    ----------
    values
        For each example its margins of the truth against each rival.
    sides
        ``[n]``, as in `Margins.classes`; both sides count the same.
    groups
        Of each example.
    right
        bool ``[n]``: whether the model's answer is right.
    places
        How many places of the stage are tried: the interval of each is as much wider (Bonferroni).

    Returns
    -------
    Calibration
        Log-odds are those of a logistic fit to one more example of each side than there are, of mean margin and read
        wrongly: where all are read right, they are not infinite but those of the rule of succession.
    """
    n = len(values)
    if n < FEWEST:
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
    # Where no slope helps, what is read is the sign of the margins themselves.
    k = slope or 1.0
    read = np.array([(k * v + (offset if s else -offset) > 0).mean() for v, s in zip(values, sides, strict=True)])
    accuracy = float((weight * read).sum())
    level = 1 - TAIL / max(1, places)
    low, high = _accuracy_interval(read, sides, groups, level)
    odds = slope * mean + offset * np.where(sides == 1, 1, -1)
    kept = odds[right] if right.sum() >= FEWEST else odds
    edge = float(np.quantile(kept, TAIL))
    # An edge above 0 needs no threshold; one below means that noise reaches as far on either side.
    return Calibration(
        n, accuracy, low, high, slope, offset, max(0.0, -edge), readable=bool(low > 0.5 and accuracy >= LEAST)
    )


def _accuracy_interval(read: np.ndarray, sides: np.ndarray, groups: Sequence[str], level: float) -> tuple[float, float]:
    """Return the interval, over groups, of the mean over sides of the share that is read right."""
    names = sorted(set(sides.tolist()))
    parts = [sides == name for name in names]
    columns = [column for part in parts for column in (part * read, part * 1.0)]
    totals = group_totals(np.column_stack(columns), groups).T  # [2 sides, G]
    spreads = [
        relative_variance(read[part], int(np.count_nonzero(t))) for part, t in zip(parts, totals[1::2], strict=True)
    ]
    low, high = combined_interval(totals[::2], totals[1::2], np.full(len(names), 1 / len(names)), level, spread=spreads)
    return float(low), float(high)


def _platt(margin: np.ndarray, side: np.ndarray, weight: np.ndarray, n: int) -> tuple[float, float]:
    """Return slope >= 0 and offset of the logistic fit that the truth is read; Newton's method, steps halved."""
    scale = float(np.abs(margin).mean()) or 1.0
    sides = sorted(set(side.tolist()))
    # One more example a side, read wrongly by a typical margin.
    m = np.concatenate([margin / scale, np.full(len(sides), -1.0)])
    s = np.concatenate([side, np.array(sides)])
    w = np.concatenate([weight * n, np.ones(len(sides))])
    x = np.column_stack([m, s])
    at = np.zeros(2)

    def loss(b: np.ndarray) -> float:
        # The offset is held near 0 as by one observation, so that it exists where one side has none.
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
