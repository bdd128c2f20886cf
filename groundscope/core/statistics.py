"""Intervals for values on groups of dependent rows, such as the questions of one image.

Rows of one image are not independent: an interval that assumes independence is too narrow. Two kinds of interval account
for groups. A rate has a formula (`groundscope.core.intervals.rate_interval`): Wilson's interval with the effective number
of independent rows. Other statistics use draws of whole groups (the cluster bootstrap: Davison & Hinkley 1997, "Bootstrap
Methods and their Application", section 3.8), whose percentile intervals are widened for few groups
(`groundscope.core.intervals.widen`). Coverage of both is measured in ``validation/test_coverage.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from groundscope.core.errors import ConfigError, DataError
from groundscope.core.intervals import combined_interval, design_excess, rate_interval, widen, wilson
from groundscope.core.text import format_count

__all__ = [
    "FEW_GROUPS",
    "Estimate",
    "Statistic",
    "changes_of_columns",
    "cluster_bootstrap",
    "draws_interval",
    "estimate",
    "group_totals",
    "mean",
    "rates_of_columns",
    "ratio",
    "relative_variance",
    "wilson",
]

FEW_GROUPS = 10
"""With fewer groups an interval is only a rough indication; results are flagged by `Estimate.few_groups`."""
_KINDS_PAY = 10
"""Cost of one multinomial number, in units of one drawn group."""
_CELLS = 1 << 18
"""Number of drawn group indices per block: small enough for a processor's cache."""

Statistic = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""Function from each draw's column totals ``[n, K]`` and numbers of rows ``[n]`` to its value ``[n]``."""


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval."""

    value: float
    """NaN if there are no rows."""
    low: float
    high: float
    n: int
    """Number of rows, or for a ratio the total of the denominator."""
    few_groups: bool = False
    """Whether there are fewer than `FEW_GROUPS` groups."""

    def __str__(self) -> str:
        few = " (few groups)" if self.few_groups else ""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{few}"


def mean(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the first column, ``[n]``."""
    return totals[:, 0] / counts


def ratio(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the total of the first column divided by that of the second, ``[n]``; NaN if the second is 0."""
    del counts  # a ratio of totals does not depend on the number of rows
    below = totals[:, 1]
    return np.divide(totals[:, 0], below, out=np.full(len(totals), np.nan), where=below != 0)


def cluster_bootstrap(
    values: ArrayLike,
    groups: Iterable[Hashable],
    statistic: Statistic = mean,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap interval of a statistic: percentiles of draws of whole groups, widened by `widen`.

    For a rate use `estimate`, whose interval is also valid near 0 and 1. Only statistics of column totals are possible,
    because each group is summed first: the cost of a draw depends on the number of groups, not of rows.

    Parameters
    ----------
    values
        ``[N]`` or ``[N, K]``, float or boolean.
    groups
        The group of each row, ``[N]``. Each draw has as many groups as the data.
    statistic
        Function of the totals of a draw: `mean`, `ratio`, or any `Statistic`.
    resamples
        Number of draws n.
    confidence
        Nominal coverage of the interval.
    seed
        Seed of the draws.

    Returns
    -------
    tuple of float
        Low and high end; NaN if there are no rows, only one group, or no defined draw. NaN draws are ignored. Both ends
        are equal if all draws are equal.

    Raises
    ------
    DataError
        If the numbers of groups and rows differ.
    ConfigError
        If there are fewer than 1 draws, or the confidence is not between 0 and 1.
    """
    _check_options(resamples, confidence)
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table  # [N, K]
    totals_by_group = group_totals(np.column_stack([table, np.ones(len(table))]), groups)  # [G, K + 1], last the rows
    if len(totals_by_group) == 0:
        return math.nan, math.nan
    totals = _totals_of_draws(totals_by_group, resamples, np.random.Generator(np.random.PCG64(seed)))  # [n, K + 1]
    whole = totals_by_group.sum(axis=0, keepdims=True)
    value = statistic(whole[:, :-1], whole[:, -1])[0]
    low, high = draws_interval(statistic(totals[:, :-1], totals[:, -1]), value, len(totals_by_group), confidence)
    return float(low), float(high)


def draws_interval(
    draws: ArrayLike, value: ArrayLike, groups: int | NDArray[np.int64], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the interval of values from draws of whole groups: percentiles, widened by `widen`.

    Parameters
    ----------
    draws
        ``[B, ...]``: the statistic in each draw; NaN where it is undefined (ignored).
    value
        ``[...]``: the statistic of the data.
    groups
        Number of groups in the data, for all values or for each ``[...]``.
    confidence
        Nominal coverage of the interval.

    Returns
    -------
    tuple of ndarray
        Low and high ends ``[...]``; NaN if no draw is defined, or there is only one group.
    """
    _check_options(1, confidence)
    table = np.asarray(draws, dtype=np.float64)
    defined = ~np.isnan(table).all(axis=0)
    low, high = np.full(defined.shape, np.nan), np.full(defined.shape, np.nan)
    if defined.any():
        low[defined], high[defined] = np.nanquantile(
            table[:, defined], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0
        )
    return widen(value, low, high, groups, confidence)


def estimate(
    numerator: ArrayLike,
    groups: Sequence[Hashable],
    denominator: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate a rate, or any ratio of totals between 0 and 1, with an interval clustered by group (`rate_interval`).

    Parameters
    ----------
    numerator
        ``[N]``: count of each row; boolean for a rate, or fractional (a rating divided by its maximum, a weight).
    groups
        The group of each row.
    denominator
        ``[N]``: total of each row; 1 by default. Groups with a total of 0 are ignored.
    confidence
        Nominal coverage of the interval.
    """
    above = np.asarray(numerator, dtype=np.float64)
    below = np.ones(len(above)) if denominator is None else np.asarray(denominator, dtype=np.float64)
    total = float(below.sum())
    totals = group_totals(np.column_stack([above, below]), groups)
    if total == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(above.sum()) / total
    counted = int(np.count_nonzero(totals[:, 1]))
    single = bool(np.isin(below, (0.0, 1.0)).all())  # else a row counts several binary outcomes
    spread = relative_variance(above[below == 1], counted) if single else 1.0
    low, high = rate_interval(totals[:, 0], totals[:, 1], confidence, spread=spread)
    return Estimate(value, float(low), float(high), round(total), counted < FEW_GROUPS)


def rates_of_columns(
    values: ArrayLike, groups: Iterable[Hashable], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the intervals of the means of rows between 0 and 1, clustered by group: ``[N, ...]`` -> twice ``[...]``.

    Each column is a separate rate on the same groups; see `rate_interval`.
    """
    return _columns(values, groups, (1.0,), confidence)


def changes_of_columns(
    values: ArrayLike, groups: Iterable[Hashable], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the intervals of the means of changes between -1 and 1, clustered by group: ``[N, ...]`` -> twice ``[...]``.

    A mean change is the rate of gains minus the rate of losses. Each rate has an interval that is also valid near 0, and
    both are combined with their correlation over groups (`combined_interval`). So the interval is valid even if nothing
    or everything changes. The prior design effect is estimated from gains and losses jointly.
    """
    return _columns(values, groups, (1.0, -1.0), confidence)


def _columns(
    values: ArrayLike, groups: Iterable[Hashable], weights: Sequence[float], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    table = np.asarray(values, dtype=np.float64)
    flat = table.reshape(len(table), -1)
    width = flat.shape[1]
    sides = np.stack([np.maximum(weight * flat, 0.0) for weight in weights])
    totals = group_totals(np.column_stack([*sides, np.ones(len(flat))]), groups).T  # [K width + 1, G]
    hits = totals[:-1].reshape(len(weights), width, -1)
    trials = np.broadcast_to(totals[-1], hits.shape)
    spread = np.array([[relative_variance(column, hits.shape[-1]) for column in side.T] for side in sides])
    spread = spread.reshape(len(weights), width)
    prior = None
    if len(weights) > 1:
        # Estimate the design effect from gains and losses jointly, since one of them may be rare.
        either = hits.sum(axis=0)
        shared_spread = np.array([relative_variance(column, hits.shape[-1]) for column in sides.sum(axis=0).T])
        share = np.clip(either.sum(axis=-1) / trials[0].sum(axis=-1), 0.0, 1.0)
        prior = design_excess(either, trials[0], share, confidence, shared_spread)[0]
        spread = np.where(hits.sum(axis=-1) > 0, spread, shared_spread)
    low, high = combined_interval(hits, trials, weights, confidence, spread=spread, prior=prior)
    return low.reshape(table.shape[1:]), high.reshape(table.shape[1:])


def relative_variance(values: NDArray[np.float64], groups: int) -> float:
    """Return the variance of rows between 0 and 1 divided by that of binary rows of the same mean: the `spread` of a rate.

    1 for binary rows, less for ratings. With few groups it is shrunk towards 1, as by one more group of binary rows: equal
    ratings of three images do not prove that all ratings are equal.
    """
    p = float(np.mean(values)) if len(values) else 0.0
    if not 0 < p < 1:
        return 1.0
    own = 1 - float(np.mean(values * (1 - values))) / (p * (1 - p))
    return (max(own, 0.0) * groups + 1) / (groups + 1)


def group_totals(table: NDArray[np.float64], groups: Iterable[Hashable]) -> NDArray[np.float64]:
    """Sum the rows of each group: ``[N, K]`` -> ``[G, K]``, groups in order of their first row.

    Raises `DataError` if the numbers of groups and rows differ.
    """
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp)
    if len(member) != len(table):
        msg = f"got {format_count(len(member), 'group')} for {format_count(len(table), 'row')}; pass one group per row"
        raise DataError(msg)
    columns = [np.bincount(member, weights=column, minlength=len(numbers)) for column in table.T]
    return np.stack(columns, axis=1).astype(np.float64, copy=False)


def _totals_of_draws(totals_by_group: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw G groups with replacement, n times, and sum their totals: ``[G, K]`` -> ``[n, K]``."""
    kinds, sizes = np.unique(totals_by_group, axis=0, return_counts=True)
    if len(kinds) * _KINDS_PAY < len(totals_by_group):
        # Groups with equal totals are interchangeable: the number of draws of each kind is multinomial.
        return rng.multinomial(len(totals_by_group), sizes / len(totals_by_group), size=n) @ kinds
    totals = np.broadcast_to(totals_by_group[0] * len(totals_by_group), (n, totals_by_group.shape[1])).copy()
    varying = [
        (k, values) for k, values in enumerate(np.ascontiguousarray(totals_by_group.T)) if np.any(values != values[0])
    ]
    step = max(1, _CELLS // len(totals_by_group))
    for start in range(0, n, step):
        members = rng.integers(0, len(totals_by_group), size=(min(step, n - start), len(totals_by_group)))
        for column, values in varying:
            totals[start : start + step, column] = values.take(members).sum(axis=1)
    return totals


def _check_options(resamples: int, confidence: float) -> None:
    if resamples < 1 or not 0 < confidence < 1:
        msg = f"resamples={resamples} must be at least 1, and confidence={confidence} between 0 and 1, such as 0.95"
        raise ConfigError(msg)
