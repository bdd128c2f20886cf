"""Intervals for rates measured on groups of rows that belong together, such as the questions of one image.

Rows of one image are not independent: resampling them one by one makes intervals too narrow. Here whole groups are
drawn (the cluster bootstrap: Davison & Hinkley 1997, "Bootstrap Methods and their Application", section 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from groundscope.core.errors import ConfigError, DataError

FEW_GROUPS = 10
"""With fewer groups than this a bootstrap over groups is too narrow to be believed; see `estimate`."""
_NO_WIDTH = 1e-12
"""Intervals narrower than this differ from a point by rounding only."""
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

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
    """Return the percentile interval of a statistic when whole groups are drawn with replacement.

    Only statistics of column totals are possible, because each group is first summed: a draw then costs no more than
    one look-up a group, however many rows there are.

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
        Low and high end; NaN where there are no rows or every draw is undefined. Draws that are NaN are left out.
        Both ends are equal where every draw gives the same, as with a single group.

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
    every = _group_totals(np.column_stack([table, np.ones(len(table))]), groups)  # [G, K + 1], last the rows
    if len(every) == 0:
        return math.nan, math.nan
    totals = _drawn_totals(every, n, np.random.Generator(np.random.PCG64(seed)))  # [n, K + 1]
    draws = statistic(totals[:, :-1], totals[:, -1])
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return math.nan, math.nan
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(k: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion: `k` of `n` independent trials (Wilson 1927, JASA 22:209).

    Never of zero width; ``(0, 1)`` for no trials. `k` and `n` need not be whole, as for effective numbers.

    Raises
    ------
    ConfigError
        Where not ``0 <= k <= n``, or the level is not between 0 and 1.
    """
    _check_options(1, level)
    if not 0 <= k <= n:
        msg = f"k={k} of n={n}: a proportion needs 0 <= k <= n"
        raise ConfigError(msg)
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, scale = k / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    # Exactly 0 or 1 at the ends, where rounding would leave 1e-17.
    return (0.0 if k == 0 else max(0.0, middle - half)), (1.0 if k == n else min(1.0, middle + half))


def estimate(
    numerator: ArrayLike,
    groups: Sequence[Hashable],
    denominator: ArrayLike | None = None,
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Estimate a rate, or any ratio of totals between 0 and 1, with an interval clustered by group.

    The interval is the cluster bootstrap's. Where that cannot be believed, it is Wilson's with every *group* that
    counts as one trial: with fewer than `FEW_GROUPS` of them, and where every draw gives the same (all right, all
    wrong), for which the bootstrap would claim certainty. One trial a group is the cautious choice: it assumes that
    rows of a group say the same.

    Parameters
    ----------
    numerator
        ``[N]``: what is counted in each row, boolean for a plain rate.
    groups
        The group of each row.
    denominator
        ``[N]``: out of how many in each row; 1 by default. A group without any does not count.
    n, seed, level
        As for `cluster_bootstrap`.
    """
    above = np.asarray(numerator, dtype=np.float64)
    below = np.ones(len(above)) if denominator is None else np.asarray(denominator, dtype=np.float64)
    pairs = np.column_stack([above, below])
    total = float(below.sum())
    if total == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(above.sum()) / total
    low, high = cluster_bootstrap(pairs, groups, ratio, n, seed, level)
    trials = int(np.count_nonzero(_group_totals(pairs, groups)[:, 1]))
    if trials < FEW_GROUPS or high - low < _NO_WIDTH:
        low, high = wilson(min(value, 1.0) * trials, trials, level)
    return Estimate(value, low, high, round(total))


def _group_totals(table: NDArray[np.float64], groups: Iterable[Hashable]) -> NDArray[np.float64]:
    """Sum the rows of each group: ``[N, K]`` -> ``[G, K]``, groups in order of their first row."""
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
