"""Intervals of rates, sums of rates and scores, from totals of groups of dependent rows.

Formulas only: `groundscope.core.statistics` applies them to rows with group names. Their coverage is measured in
``validation/test_coverage.py``.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincinv, stdtrit

from groundscope.core.errors import ConfigError

_LOWEST = -0.9
"""Least excess of a design effect: negatively correlated rows count as at most ten times as many rows."""
_SMALL = 50
"""Largest number of trials for which the end of Wilson's interval near 0 or 1 is corrected; see `rate_interval`."""


def rate_interval(
    hits: ArrayLike,
    trials: ArrayLike,
    confidence: float = 0.95,
    *,
    spread: ArrayLike = 1.0,
    prior: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's interval of rates of grouped trials, at the effective number of independent trials.

    Parameters
    ----------
    hits, trials
        ``[..., G]``: totals of each group, ``0 <= hits <= trials``. For weighted trials, pass totals of weights that sum
        to the effective number of trials, ``sum(w) ** 2 / sum(w ** 2)``.
    confidence
        Nominal coverage of the interval.
    spread
        ``[...]``: variance of a trial divided by that of a binary trial of the same mean: 1 for binary trials, less for ratings.
    prior
        ``[...]``: prior excess of the design effect, which dominates for few hits (see Notes), from another rate on the same
        groups; None for the largest possible excess.

    Returns
    -------
    tuple of ndarray
        Low and high ends ``[...]``, ``(0, 1)`` without trials.

    Notes
    -----
    With p hits in N trials, a_g of b_g in group g, the design effect is
    ``D = sum_g (a_g - p b_g) ** 2 / (N p (1 - p))`` (Rao & Scott 1992, Biometrics 48:577), and the interval that of
    ``N / D`` trials: with one trial per group, exactly Wilson's. Three corrections keep the coverage at low rates and with
    few groups.

    Few hits carry little information on D, 0 or 1 hits none. So the excess ``D - 1`` is a weighted mean of the measured
    excess, with weight ``e ** 1.5``, and of the largest excess, if the trials of a group always agree,
    ``sum(b_g ** 2) / N - 1``, with weight 1. e is the effective number of groups with the rarer outcome,
    ``sum(c_g) ** 2 / sum(c_g ** 2)`` over groups of more than one trial with c_g such outcomes. The excess is also
    uncertain for small e: it is multiplied by ``(t / z) ** 2``, t with e degrees of freedom (at least 3), up to the largest
    excess. If rows of a group differ more than by chance, for example if every image has equal numbers of right and wrong
    answers by design, D is below 1; such a measured excess is reduced by the share ``4 / e``, since few groups can show it
    by chance.

    The lower end of Wilson's interval is too high for k = 1 or 2 hits of few trials (Brown, Cai & DasGupta 2001,
    Statistical Science 16:101, section 4.1.2). For up to 50 independent trials or groups, the end is the Poisson end of
    that paper: the quantile ``1 - confidence`` of a gamma distribution of shape k, divided by the number of trials; likewise
    at 1.
    """
    check_confidence(confidence)
    a, b = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    total = b.sum(axis=-1)
    has_trials = total > 0
    p = np.clip(np.divide(a.sum(axis=-1), total, out=np.zeros_like(total), where=has_trials), 0.0, 1.0)
    of_trial = np.asarray(spread, dtype=np.float64)
    excess, largest = design_excess(a, b, p, confidence, of_trial, prior)
    effective = np.where(has_trials, total, 1.0) / (of_trial * (1 + excess))
    low, high = _wilson(p, effective, confidence)
    agree = (effective <= _SMALL) & (excess >= largest) & (p > 0) & (p < 1)
    hit, missed = p * effective, (1 - p) * effective
    first, last = agree & (hit < 3), agree & (missed < 3)
    low = np.where(first, np.minimum(low, gammaincinv(np.where(first, hit, 1.0), 1 - confidence) / effective), low)
    high = np.where(
        last, np.maximum(high, 1 - gammaincinv(np.where(last, missed, 1.0), 1 - confidence) / effective), high
    )
    return np.where(has_trials, low, 0.0), np.where(has_trials, high, 1.0)


def design_excess(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    p: NDArray[np.float64],
    confidence: float,
    spread: NDArray[np.float64],
    prior: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the design effect minus 1 of rates p ``[...]``, and its largest value; see `rate_interval`."""
    total = np.maximum(b.sum(axis=-1), 1e-300)
    n_groups = np.count_nonzero(b, axis=-1)
    largest = np.maximum((b**2).sum(axis=-1) / total - 1, 0.0)
    variance = p * (1 - p) * spread
    varied = ((a - p[..., None] * b) ** 2).sum(axis=-1) / total
    measured = np.divide(varied, variance, out=np.ones_like(p), where=variance > 0) - 1
    # Groups of one trial have no design effect; n_groups / (n_groups - 1) corrects the bias of the others.
    measured = np.where(largest > 0, (1 + measured) * n_groups / np.maximum(n_groups - 1, 1) - 1, 0.0)
    rarer = np.where((p <= 0.5)[..., None], a, b - a) * (b > 1)
    square = (rarer**2).sum(axis=-1)
    e = np.divide(rarer.sum(axis=-1) ** 2, square, out=np.zeros_like(p), where=square > 0)
    measured = np.where(measured < 0, measured * (1 - 4 / np.maximum(e, 4.0)), measured)
    weight = e**1.5
    before = largest if prior is None else np.asarray(prior, dtype=np.float64)
    excess = (measured * weight + before) / (weight + 1)
    wider = np.minimum(excess * _student(np.maximum(e, 3.0), confidence) ** 2, np.maximum(excess, largest))
    return np.clip(np.where(excess > 0, wider, excess), _LOWEST, None), largest


def combined_interval(
    hits: ArrayLike,
    trials: ArrayLike,
    weights: ArrayLike,
    confidence: float = 0.95,
    *,
    spread: ArrayLike = 1.0,
    prior: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the interval of a weighted sum of rates on the same groups, such as a mean of recalls or a difference.

    Each rate has its own `rate_interval`; the distances to their ends are combined like standard errors, with the
    correlations of the rates over groups (Zou & Donner 2008, Statistics in Medicine 27:1693). Near 0 and 1 the interval is
    asymmetric like theirs, and its width is positive even if all groups agree.

    Parameters
    ----------
    hits, trials
        ``[K, ..., G]``: totals of each group, as for `rate_interval`; 0 trials where a rate does not cover a group.
    weights
        ``[K]``: ``(.5, .5)`` for a balanced accuracy, ``(1, -1)`` for a difference.
    confidence
        Nominal coverage of the interval.
    spread
        ``[K]``, ``[K, ...]``, or a scalar, as for `rate_interval`.
    prior
        ``[...]``, shared by all K rates, or None, as for `rate_interval`.

    Returns
    -------
    tuple of ndarray
        Low and high ends ``[...]``, within the range of the weighted sum; NaN if a rate has no trials.
    """
    a, b = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    columns = (-1, *(1 for _ in a.shape[1:-1]))
    c = np.asarray(weights, dtype=np.float64).reshape(columns)  # [K, 1, ...]
    of_value = np.asarray(spread, dtype=np.float64)
    of_value = of_value.reshape(columns) if of_value.shape == (len(a),) else of_value
    low, high = rate_interval(a, b, confidence, spread=np.broadcast_to(of_value, a.shape[:-1]), prior=prior)
    total = b.sum(axis=-1)
    p = np.divide(a.sum(axis=-1), total, out=np.full(total.shape, np.nan), where=total > 0)  # [K, ...]
    residual = (a - np.nan_to_num(p)[..., None] * b) * np.divide(1, total, out=np.zeros(total.shape), where=total > 0)[
        ..., None
    ]
    covariance = np.einsum("k...g,j...g->kj...", residual, residual)
    deviation = np.sqrt(np.einsum("kk...->k...", covariance))
    scale = deviation[:, None] * deviation[None]
    correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    correlation[np.arange(len(a)), np.arange(len(a))] = 1.0
    value = (c * p).sum(axis=0)
    ends = []
    for side in (-1, 1):
        # For the low end of the sum, take the low ends of rates with positive weight and the high ends of the others.
        up = (c > 0) if side > 0 else (c < 0)
        distance = c * np.where(up, high - p, p - low)
        ends.append(
            value + side * np.sqrt(np.maximum(np.einsum("k...,kj...,j...->...", distance, correlation, distance), 0.0))
        )
    least, most = np.minimum(c, 0).sum(axis=0), np.maximum(c, 0).sum(axis=0)
    return np.maximum(ends[0], least), np.minimum(ends[1], most)


def share_interval(
    value: ArrayLike, variance: ArrayLike, trials: ArrayLike, groups: ArrayLike, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's interval of scores between 0 and 1 other than rates, from the variance of bootstrap draws.

    For balanced accuracy and areas under ROC curves. The interval is that of ``value (1 - value) / variance`` trials, at
    most `trials` and at least 1, with Student's quantile for the number of groups. It stays between 0 and 1, and its width
    is positive even if all draws are equal, for example if all answers are right.

    Parameters
    ----------
    value
        ``[...]``, from 0 to 1.
    variance
        ``[...]``: variance over draws of whole groups.
    trials
        ``[...]``: largest effective number of trials, counted over the groups that contribute to the variance.
    groups
        ``[...]``: number of groups that contribute to the variance.
    confidence
        Nominal coverage of the interval.
    """
    p, v, most, count = (np.asarray(x, dtype=np.float64) for x in (value, variance, trials, groups))
    degrees = np.maximum(count - 1, 1.0)
    v = v * (degrees + 1) / degrees
    effective = np.divide(p * (1 - p), v, out=np.full(np.broadcast(p, v).shape, np.inf), where=v > 0)
    effective = np.clip(effective / _student(degrees, confidence) ** 2, 1.0, np.maximum(most, 1.0))
    return _wilson(p, effective, confidence)


def _wilson(
    p: NDArray[np.float64], n: NDArray[np.float64], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's interval of shares of n trials, n > 0, elementwise; see `wilson`."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # Return exactly 0 or 1 at the boundaries, where rounding would give 1e-17.
    return np.where(p <= 0, 0.0, np.maximum(0.0, middle - half)), np.where(p >= 1, 1.0, np.minimum(1.0, middle + half))


def _student(degrees: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """Return Student's two-sided quantile divided by the normal quantile, at least 1."""
    return np.maximum(stdtrit(degrees, (1 + confidence) / 2) / NormalDist().inv_cdf((1 + confidence) / 2), 1.0)


def widen(
    value: ArrayLike, low: ArrayLike, high: ArrayLike, groups: int | NDArray[np.int64], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Widen a percentile interval around its value, to correct for a small number of groups.

    With G groups the standard deviation of draws is too small by the factor ``sqrt((G - 1) / G)``, and their quantiles are
    normal, where Student's with G - 1 degrees of freedom are needed. So the distances of both ends from the value are
    multiplied by ``sqrt(G / (G - 1)) t / z``: 1.37 with 8 groups, 1.01 with 150, infinite (NaN here) with one group. For
    means of groups of equal size this is approximately the t interval; it preserves the asymmetry of the draws.

    References
    ----------
    Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician 69:371, on percentile
    intervals that are too narrow; here distances are scaled instead of moving percentiles outward, because few groups have
    few distinct draws.
    """
    count = np.asarray(groups, dtype=np.float64)
    middle, below, above = (np.asarray(x, dtype=np.float64) for x in (value, low, high))
    degrees = np.maximum(count - 1, 1)
    factor = np.where(count > 1, np.sqrt((degrees + 1) / degrees) * _student(degrees, confidence), np.nan)
    return middle - factor * (middle - below), middle + factor * (above - middle)


def wilson(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion: `k` of `n` independent trials (Wilson 1927, JASA 22:209).

    The width is positive; ``(0, 1)`` for no trials. `k` and `n` may be fractional, for effective numbers.

    Raises
    ------
    ConfigError
        Unless ``0 <= k <= n`` and the confidence is between 0 and 1.
    """
    check_confidence(confidence)
    if not 0 <= k <= n:
        msg = f"invalid proportion: k={k} of n={n} must satisfy 0 <= k <= n"
        raise ConfigError(msg)
    if n == 0:
        return 0.0, 1.0
    low, high = _wilson(np.float64(k / n), np.float64(n), confidence)  # pyright: ignore[reportArgumentType]  # 0-d arrays
    return float(low), float(high)


def check_confidence(confidence: float) -> None:
    """Raise `ConfigError` unless a confidence is between 0 and 1."""
    if not 0 < confidence < 1:
        msg = f"confidence={confidence} must be between 0 and 1, such as 0.95"
        raise ConfigError(msg)
