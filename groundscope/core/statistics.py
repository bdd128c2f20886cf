"""Intervals for values measured on groups of rows that belong together, such as the questions of one image.

Rows of one image are not independent: an interval that takes them for independent is too narrow. Two kinds of interval
know groups. A rate has a formula (`groundscope.core.intervals.rate_interval`): Wilson's interval with the number of
independent rows that are worth as much. Everything else has draws of whole groups (the cluster bootstrap: Davison & Hinkley
1997, "Bootstrap Methods and their Application", section 3.8), whose percentiles are moved apart for the number of groups
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
"""With fewer groups than this an interval says how little is known, not where the value is; results say so."""
_KINDS_PAY = 10
"""A multinomial number costs about as much as this many drawn groups."""
_CELLS = 1 << 18
"""Drawn group numbers held at once: few enough to stay in the processor's cache."""

Statistic = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""From each draw's column totals ``[n, K]`` and numbers of rows ``[n]`` to its value ``[n]``."""


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval."""

    value: float
    """NaN where nothing was measured."""
    low: float
    high: float
    n: int
    """How many rows, or for a ratio how many counted things, it was measured on."""
    few_groups: bool = False
    """Whether fewer than `FEW_GROUPS` groups were measured."""

    def __str__(self) -> str:
        few = " (few groups)" if self.few_groups else ""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{few}"


def mean(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the first column, ``[n]``."""
    return totals[:, 0] / counts


def ratio(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the total of the first column over that of the second, ``[n]``; NaN where the second is 0."""
    del counts  # a ratio of totals does not depend on the number of rows
    below = totals[:, 1]
    return np.divide(totals[:, 0], below, out=np.full(len(totals), np.nan), where=below != 0)


def cluster_bootstrap(
    values: ArrayLike,
    groups: Iterable[Hashable],
    statistic: Statistic = mean,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the bootstrap interval of a statistic: percentiles of draws of whole groups, moved apart by `widen`.

    For a rate use `estimate`, whose interval is right near 0 and 1 too. Only statistics of column totals are possible,
    because each group is first summed: a draw then costs no more than one look-up a group, however many rows there are.

    Parameters
    ----------
    values
        ``[N]`` or ``[N, K]``, float or boolean.
    groups
        The group of each row, N of them. Each draw takes as many groups as there are.
    statistic
        What to compute from the totals of a draw: `mean`, `ratio`, or any `Statistic`.
    n
        Number of draws.
    seed
        Decides the draws.
    level
        Coverage aimed at.

    Returns
    -------
    tuple of float
        Low and high end; NaN where there are no rows, a single group, or every draw is undefined. Draws that are NaN are
        left out. Both ends are equal where every draw gives the same.

    Raises
    ------
    DataError
        Where there are not as many groups as rows.
    ConfigError
        For fewer than 1 draw, or a level not between 0 and 1.
    """
    _check_options(n, level)
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table  # [N, K]
    every = group_totals(np.column_stack([table, np.ones(len(table))]), groups)  # [G, K + 1], last the rows
    if len(every) == 0:
        return math.nan, math.nan
    totals = _drawn_totals(every, n, np.random.Generator(np.random.PCG64(seed)))  # [n, K + 1]
    whole = every.sum(axis=0, keepdims=True)
    value = statistic(whole[:, :-1], whole[:, -1])[0]
    low, high = draws_interval(statistic(totals[:, :-1], totals[:, -1]), value, len(every), level)
    return float(low), float(high)


def draws_interval(
    draws: ArrayLike, value: ArrayLike, groups: int | NDArray[np.int64], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the interval of values from draws of whole groups: percentiles, moved apart by `widen`.

    Parameters
    ----------
    draws
        ``[B, ...]``: the statistic in each draw; NaN where it is undefined, which is left out.
    value
        ``[...]``: the statistic of the data.
    groups
        How many groups were drawn from, for all values or for each ``[...]``.
    level
        Coverage aimed at.

    Returns
    -------
    tuple of ndarray
        Low and high ends ``[...]``; NaN where no draw is defined, or there is one group only.
    """
    _check_options(1, level)
    table = np.asarray(draws, dtype=np.float64)
    defined = ~np.isnan(table).all(axis=0)
    low, high = np.full(defined.shape, np.nan), np.full(defined.shape, np.nan)
    if defined.any():
        low[defined], high[defined] = np.nanquantile(table[:, defined], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return widen(value, low, high, groups, level)


def estimate(
    numerator: ArrayLike,
    groups: Sequence[Hashable],
    denominator: ArrayLike | None = None,
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Estimate a rate, or any ratio of totals between 0 and 1, with an interval clustered by group (`rate_interval`).

    Parameters
    ----------
    numerator
        ``[N]``: what is counted in each row, boolean for a plain rate, or a part of it (a rating over its top, a weight).
    groups
        The group of each row.
    denominator
        ``[N]``: out of how many in each row; 1 by default. A group without any does not count.
    n, seed
        Not used since the interval has a formula; accepted so that calls stay as they are.
    level
        Coverage aimed at.
    """
    del n, seed
    above = np.asarray(numerator, dtype=np.float64)
    below = np.ones(len(above)) if denominator is None else np.asarray(denominator, dtype=np.float64)
    total = float(below.sum())
    totals = group_totals(np.column_stack([above, below]), groups)
    if total == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(above.sum()) / total
    counted = int(np.count_nonzero(totals[:, 1]))
    single = bool(np.isin(below, (0.0, 1.0)).all())  # else a row counts several things, each yes or no
    spread = relative_variance(above[below == 1], counted) if single else 1.0
    low, high = rate_interval(totals[:, 0], totals[:, 1], level, spread=spread)
    return Estimate(value, float(low), float(high), round(total), counted < FEW_GROUPS)


def rates_of_columns(
    values: ArrayLike, groups: Iterable[Hashable], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the intervals of the means of rows between 0 and 1, clustered by group: ``[N, ...]`` -> twice ``[...]``.

    Each column is a rate of its own on the same groups; see `rate_interval`.
    """
    return _columns(values, groups, (1.0,), level)


def changes_of_columns(
    values: ArrayLike, groups: Iterable[Hashable], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the intervals of the means of changes between -1 and 1, clustered by group: ``[N, ...]`` -> twice ``[...]``.

    A mean change is the rate of what is gained less the rate of what is lost. Each has an interval that is right near 0
    too, and both are combined with their correlation over groups (`combined_interval`). So a change has an interval where
    nothing changes, and where all does. Where gains or losses are few, how much rows of a group agree is taken from both.
    """
    return _columns(values, groups, (1.0, -1.0), level)


def _columns(
    values: ArrayLike, groups: Iterable[Hashable], weights: Sequence[float], level: float
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
        # How much rows of a group change together is seen on gains and losses at once: where one is rare the other says it.
        either = hits.sum(axis=0)
        alike = np.array([relative_variance(column, hits.shape[-1]) for column in sides.sum(axis=0).T])
        share = np.clip(either.sum(axis=-1) / trials[0].sum(axis=-1), 0.0, 1.0)
        prior = design_excess(either, trials[0], share, level, alike)[0]
        spread = np.where(hits.sum(axis=-1) > 0, spread, alike)
    low, high = combined_interval(hits, trials, weights, level, spread=spread, prior=prior)
    return low.reshape(table.shape[1:]), high.reshape(table.shape[1:])


def relative_variance(values: NDArray[np.float64], groups: int) -> float:
    """Return the variance of rows between 0 and 1 over that of a yes or no of the same mean: the `spread` of a rate.

    1 for yes and no, less for ratings. Where it is measured on few groups it is drawn towards 1, as by one group of yes and
    no: equal ratings of three images do not say that there are no others.
    """
    p = float(np.mean(values)) if len(values) else 0.0
    if not 0 < p < 1:
        return 1.0
    own = 1 - float(np.mean(values * (1 - values))) / (p * (1 - p))
    return (max(own, 0.0) * groups + 1) / (groups + 1)


def group_totals(table: NDArray[np.float64], groups: Iterable[Hashable]) -> NDArray[np.float64]:
    """Sum the rows of each group: ``[N, K]`` -> ``[G, K]``, groups in order of their first row.

    Raises `DataError` where there are not as many groups as rows.
    """
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp)
    if len(member) != len(table):
        msg = f"{len(member)} groups for {len(table)} rows: each row needs its group"
        raise DataError(msg)
    columns = [np.bincount(member, weights=column, minlength=len(numbers)) for column in table.T]
    return np.stack(columns, axis=1).astype(np.float64, copy=False)


def _drawn_totals(every: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw as many groups as there are, n times, and add their totals up: ``[G, K]`` -> ``[n, K]``."""
    kinds, sizes = np.unique(every, axis=0, return_counts=True)
    if len(kinds) * _KINDS_PAY < len(every):
        # Groups with equal totals cannot be told apart: how many of each kind are drawn is multinomial.
        return rng.multinomial(len(every), sizes / len(every), size=n) @ kinds
    totals = np.broadcast_to(every[0] * len(every), (n, every.shape[1])).copy()
    varying = [(k, values) for k, values in enumerate(np.ascontiguousarray(every.T)) if np.any(values != values[0])]
    step = max(1, _CELLS // len(every))
    for start in range(0, n, step):
        drawn = rng.integers(0, len(every), size=(min(step, n - start), len(every)))
        for column, values in varying:
            totals[start : start + step, column] = values.take(drawn).sum(axis=1)
    return totals


def _check_options(n: int, level: float) -> None:
    if n < 1 or not 0 < level < 1:
        msg = f"n={n}, level={level}: at least 1 draw and a level between 0 and 1, as in 0.95, are needed"
        raise ConfigError(msg)
