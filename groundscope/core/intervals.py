"""Intervals of rates, sums of rates and scores, given totals of groups of rows that belong together.

Formulas alone: `groundscope.core.statistics` applies them to rows with names of groups. Their coverage is measured in
``validation/test_coverage.py``.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincinv, stdtrit

from groundscope.core.errors import ConfigError

_LOWEST = -0.9
"""Least excess of a design effect: rows of a group that exclude each other are worth at most ten times as many."""
_SMALL = 50
"""Up to this many trials the end of Wilson's interval next to 0 or 1 is corrected; see `rate_interval`."""


def rate_interval(
    hits: ArrayLike,
    trials: ArrayLike,
    level: float = 0.95,
    *,
    spread: ArrayLike = 1.0,
    prior: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's interval of rates whose trials come in groups, at the number of independent trials worth as much.

    Parameters
    ----------
    hits, trials
        ``[..., G]``: totals of each group, ``0 <= hits <= trials``. Weighted trials are given as totals of weights that
        add up to the number of equally weighted trials worth as much, ``sum(w) ** 2 / sum(w ** 2)``.
    level
        Coverage aimed at.
    spread
        ``[...]``: variance of a trial over that of a yes or no of the same mean: 1 for yes and no, less for ratings.
    prior
        ``[...]``: what the excess of the design effect is taken for as long as hits are few (below), where another rate on
        the same groups says more of it; None for the largest possible.

    Returns
    -------
    tuple of ndarray
        Low and high ends ``[...]``, ``(0, 1)`` without trials.

    Notes
    -----
    With p hits in N trials, a_g of b_g in group g, the design effect is
    ``D = sum_g (a_g - p b_g) ** 2 / (N p (1 - p))`` (Rao & Scott 1992, Biometrics 48:577), and the interval that of
    ``N / D`` trials: for groups of one trial each exactly Wilson's. Three things make it hold for low rates and few groups.

    Few hits say little of D: 0 or 1 of them nothing. So the excess ``D - 1`` is a weighted mean of the measured one, with
    weight ``e ** 1.5``, and of the largest one, where the trials of a group always agree, ``sum(b_g ** 2) / N - 1``, with
    weight 1. e is the effective number of groups with the rarer outcome, ``sum(c_g) ** 2 / sum(c_g ** 2)`` over groups of
    more than one trial with c_g such outcomes. The measured excess varies with e too: it is multiplied by
    ``(t / z) ** 2``, t of e degrees of freedom (at least 3), up to that largest one. Where rows of a group differ more than
    by chance, as where every image has as many right as wrong answers by design, D is under 1; of such a measured excess
    ``4 / e`` is left out, since few groups show it by chance.

    Wilson's interval of k = 1 or 2 of few trials begins too far from 0 (Brown, Cai & DasGupta 2001, Statistical Science
    16:101, section 4.1.2). Where trials or groups count as independent and there are up to 50 of them, its end is
    the Poisson one that they give: the quantile ``1 - level`` of a gamma distribution of shape k, over their number;
    likewise at 1.
    """
    check_level(level)
    a, b = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    total = b.sum(axis=-1)
    known = total > 0
    p = np.clip(np.divide(a.sum(axis=-1), total, out=np.zeros_like(total), where=known), 0.0, 1.0)
    of_trial = np.asarray(spread, dtype=np.float64)
    excess, largest = design_excess(a, b, p, level, of_trial, prior)
    worth = np.where(known, total, 1.0) / (of_trial * (1 + excess))
    low, high = _wilson(p, worth, level)
    agree = (worth <= _SMALL) & (excess >= largest) & (p > 0) & (p < 1)
    hit, missed = p * worth, (1 - p) * worth
    first, last = agree & (hit < 3), agree & (missed < 3)
    low = np.where(first, np.minimum(low, gammaincinv(np.where(first, hit, 1.0), 1 - level) / worth), low)
    high = np.where(last, np.maximum(high, 1 - gammaincinv(np.where(last, missed, 1.0), 1 - level) / worth), high)
    return np.where(known, low, 0.0), np.where(known, high, 1.0)


def design_excess(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    p: NDArray[np.float64],
    level: float,
    spread: NDArray[np.float64],
    prior: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the design effect less 1 of rates p ``[...]``, and the largest one; see `rate_interval`."""
    total = np.maximum(b.sum(axis=-1), 1e-300)
    n_groups = np.count_nonzero(b, axis=-1)
    largest = np.maximum((b**2).sum(axis=-1) / total - 1, 0.0)
    variance = p * (1 - p) * spread
    varied = ((a - p[..., None] * b) ** 2).sum(axis=-1) / total
    measured = np.divide(varied, variance, out=np.ones_like(p), where=variance > 0) - 1
    # Rows of one trial a group have no design effect; n_groups / (n_groups - 1) corrects that of the others.
    measured = np.where(largest > 0, (1 + measured) * n_groups / np.maximum(n_groups - 1, 1) - 1, 0.0)
    rarer = np.where((p <= 0.5)[..., None], a, b - a) * (b > 1)
    square = (rarer**2).sum(axis=-1)
    e = np.divide(rarer.sum(axis=-1) ** 2, square, out=np.zeros_like(p), where=square > 0)
    measured = np.where(measured < 0, measured * (1 - 4 / np.maximum(e, 4.0)), measured)
    trust = e**1.5
    before = largest if prior is None else np.asarray(prior, dtype=np.float64)
    excess = (measured * trust + before) / (trust + 1)
    wider = np.minimum(excess * _student(np.maximum(e, 3.0), level) ** 2, np.maximum(excess, largest))
    return np.clip(np.where(excess > 0, wider, excess), _LOWEST, None), largest


def combined_interval(
    hits: ArrayLike,
    trials: ArrayLike,
    weights: ArrayLike,
    level: float = 0.95,
    *,
    spread: ArrayLike = 1.0,
    prior: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the interval of a weighted sum of rates on the same groups: a mean of recalls, a difference of two rates.

    Each rate has its own `rate_interval`; their distances are combined as standard errors are, with the correlations of the
    rates over groups (Zou & Donner 2008, Statistics in Medicine 27:1693). Near 0 and 1 the interval is as asymmetric as
    theirs, and it has a width where every group says the same.

    Parameters
    ----------
    hits, trials
        ``[K, ..., G]``: totals of each group, as for `rate_interval`. Rates of other groups have 0 trials in these.
    weights
        ``[K]``: ``(.5, .5)`` for a balanced accuracy, ``(1, -1)`` for a difference.
    level
        Coverage aimed at.
    spread
        ``[K]``, ``[K, ...]``, or one for all: as for `rate_interval`.
    prior
        ``[...]``, the same for all K, or None: as for `rate_interval`.

    Returns
    -------
    tuple of ndarray
        Low and high ends ``[...]``, within what the weights allow; NaN where a rate has no trials.
    """
    a, b = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    columns = (-1, *(1 for _ in a.shape[1:-1]))
    c = np.asarray(weights, dtype=np.float64).reshape(columns)  # [K, 1, ...]
    of_value = np.asarray(spread, dtype=np.float64)
    of_value = of_value.reshape(columns) if of_value.shape == (len(a),) else of_value
    low, high = rate_interval(a, b, level, spread=np.broadcast_to(of_value, a.shape[:-1]), prior=prior)
    total = b.sum(axis=-1)
    p = np.divide(a.sum(axis=-1), total, out=np.full(total.shape, np.nan), where=total > 0)  # [K, ...]
    residual = (a - np.nan_to_num(p)[..., None] * b) * np.divide(1, total, out=np.zeros(total.shape), where=total > 0)[
        ..., None
    ]
    covariance = np.einsum("k...g,j...g->kj...", residual, residual)
    deviation = np.sqrt(np.einsum("kk...->k...", covariance))
    scale = deviation[:, None] * deviation[None]
    alike = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    alike[np.arange(len(a)), np.arange(len(a))] = 1.0
    value = (c * p).sum(axis=0)
    ends = []
    for side in (-1, 1):
        # To move the sum down, rates of positive weight go to their low ends and the others to their high ones.
        up = (c > 0) if side > 0 else (c < 0)
        distance = c * np.where(up, high - p, p - low)
        ends.append(
            value + side * np.sqrt(np.maximum(np.einsum("k...,kj...,j...->...", distance, alike, distance), 0.0))
        )
    least, most = np.minimum(c, 0).sum(axis=0), np.maximum(c, 0).sum(axis=0)
    return np.maximum(ends[0], least), np.minimum(ends[1], most)


def share_interval(
    value: ArrayLike, variance: ArrayLike, trials: ArrayLike, groups: ArrayLike, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's interval of scores between 0 and 1 that are no plain rates, from the variance of their draws.

    For balanced accuracy and areas under ROC curves. The interval is that of ``value (1 - value) / variance`` trials, at
    most `trials` and at least 1, with Student's quantile for the number of groups. It stays between 0 and 1, and has a
    width where every draw gives the same, as where all is right.

    Parameters
    ----------
    value
        ``[...]``, from 0 to 1.
    variance
        ``[...]``: of draws of whole groups.
    trials
        ``[...]``: the largest number of trials that it may be worth: of groups that its variance can be measured on.
    groups
        ``[...]``: how many groups the variance is measured on.
    level
        Coverage aimed at.
    """
    p, v, most, count = (np.asarray(x, dtype=np.float64) for x in (value, variance, trials, groups))
    degrees = np.maximum(count - 1, 1.0)
    v = v * (degrees + 1) / degrees
    worth = np.divide(p * (1 - p), v, out=np.full(np.broadcast(p, v).shape, np.inf), where=v > 0)
    worth = np.clip(worth / _student(degrees, level) ** 2, 1.0, np.maximum(most, 1.0))
    return _wilson(p, worth, level)


def _wilson(
    p: NDArray[np.float64], n: NDArray[np.float64], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's interval of shares of n trials, n > 0, elementwise; see `wilson`."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # Exactly 0 or 1 at the ends, where rounding would leave 1e-17.
    return np.where(p <= 0, 0.0, np.maximum(0.0, middle - half)), np.where(p >= 1, 1.0, np.minimum(1.0, middle + half))


def _student(degrees: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Return Student's two-sided quantile over the normal one, at least 1."""
    return np.maximum(stdtrit(degrees, (1 + level) / 2) / NormalDist().inv_cdf((1 + level) / 2), 1.0)


def widen(
    value: ArrayLike, low: ArrayLike, high: ArrayLike, groups: int | NDArray[np.int64], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move the ends of a percentile interval away from its value, for the number of groups that it was drawn from.

    With G groups the draws vary too little, by the factor ``sqrt((G - 1) / G)``, and their quantiles are those of a normal
    distribution where Student's with G - 1 degrees of freedom is needed. The distances of both ends from the value are
    therefore multiplied by ``sqrt(G / (G - 1)) t / z``: 1.37 with 8 groups, 1.01 with 150, infinite (NaN here) with one.
    For means of groups of one size this is about the t interval; it keeps the asymmetry of the draws.

    References
    ----------
    Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician 69:371, on percentile
    intervals that are too narrow; here distances are multiplied, not percentiles moved outward, because a few groups have
    few different draws.
    """
    count = np.asarray(groups, dtype=np.float64)
    middle, below, above = (np.asarray(x, dtype=np.float64) for x in (value, low, high))
    degrees = np.maximum(count - 1, 1)
    factor = np.where(count > 1, np.sqrt((degrees + 1) / degrees) * _student(degrees, level), np.nan)
    return middle - factor * (middle - below), middle + factor * (above - middle)


def wilson(k: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion: `k` of `n` independent trials (Wilson 1927, JASA 22:209).

    Never of zero width; ``(0, 1)`` for no trials. `k` and `n` need not be whole, as for effective numbers.

    Raises
    ------
    ConfigError
        Where not ``0 <= k <= n``, or the level is not between 0 and 1.
    """
    check_level(level)
    if not 0 <= k <= n:
        msg = f"k={k} of n={n}: a proportion needs 0 <= k <= n"
        raise ConfigError(msg)
    if n == 0:
        return 0.0, 1.0
    low, high = _wilson(np.float64(k / n), np.float64(n), level)  # pyright: ignore[reportArgumentType]  # 0-d arrays
    return float(low), float(high)


def check_level(level: float) -> None:
    """Raise `ConfigError` unless a level is between 0 and 1."""
    if not 0 < level < 1:
        msg = f"level={level}: a level between 0 and 1, as in 0.95, is needed"
        raise ConfigError(msg)
