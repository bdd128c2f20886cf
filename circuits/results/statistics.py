"""Uncertainty of head scores: bootstrap over groups, sign-flip tests, split halves.

Pairs of one scene are correlated, so the unit is always the group: whole groups are drawn, flipped or split. Effects are
summed by group once, and each repetition is then one row of a matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from groundscope.core.artifacts import freeze
from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import FEW_GROUPS, Estimate, draws_interval

_TIE = 1e-9
"""Relative tolerance of ties: sums of the same numbers in another order count as equal."""


@dataclass(frozen=True)
class Stability:
    """Agreement of the rankings of heads by two random halves of the groups.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits.results.statistics import stability
    >>> effects = np.arange(6.0).reshape(1, 2, 3).repeat(8, axis=0)
    >>> result = stability(effects, [f"scene {i}" for i in range(8)], k=2)
    >>> result.rank_correlation.value, result.overlap.value, round(result.chance, 2)
    (1.0, 1.0, 0.33)
    """

    rank_correlation: Estimate
    """Median Spearman correlation of the two halves' mean effects over all heads, and its range over splits."""
    overlap: Estimate
    """Median share of the top `k` heads of one half in the top `k` of the other, and its range over splits."""
    k: int
    chance: float
    """Expected overlap of unrelated rankings: ``k`` divided by the number of heads."""


@dataclass(frozen=True, eq=False)
class RankingComparison:
    """Agreement of two scores of heads, with bootstrap intervals over groups; returned by `circuits.compare`.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits.results.statistics import GroupedScores, compare_rows
    >>> groups = ("a", "b", "c")
    >>> first = GroupedScores(np.arange(6.0).reshape(1, 2, 3).repeat(3, axis=0), groups)
    >>> comparison = compare_rows(first, GroupedScores(-first.values, groups), k=[1])
    >>> round(comparison.rank_correlation.value, 6), comparison.overlap[1].value, round(comparison.chance(1), 2)
    (-1.0, 0.0, 0.17)
    """

    rank_correlation: Estimate
    """Spearman correlation of the mean scores over all heads."""
    overlap: Mapping[int, Estimate]
    """For each ``k``, the share of the top ``k`` heads of one score in the top ``k`` of the other."""
    difference: np.ndarray
    """Mean of the first minus mean of the second, float64 ``[n_layers, n_heads]``; paired where groups are shared."""
    low: np.ndarray
    high: np.ndarray
    n_heads: int
    groups: tuple[int, int, int]
    """Number of groups in the first only, in the second only, and in both."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlap", MappingProxyType(dict(self.overlap)))
        freeze(self)

    def chance(self, k: int) -> float:
        """Return the expected overlap at `k` of unrelated rankings."""
        return k / self.n_heads


@dataclass(frozen=True, eq=False)
class GroupedScores:
    """Scores by row, and the group of each row."""

    values: np.ndarray
    """``[N, n_layers, n_heads]``, finite."""
    groups: tuple[str, ...]


def by_group(values: np.ndarray, groups: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the sorted names of groups, their sums, float64 ``[G, ...]``, and their numbers of rows, ``[G]``."""
    names, index = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values.astype(np.float64))
    return names.tolist(), sums, np.bincount(index)


def mean_interval(
    values: np.ndarray,
    groups: Sequence[str],
    confidence: float = 0.95,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bootstrap interval over groups of the mean over rows, ``[N, ...]`` -> twice ``[...]``.

    Percentiles, widened for few groups (`groundscope.core.intervals.widen`); NaN for a single group.
    """
    _, sums, counts = by_group(values, groups)
    n = len(counts)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, groups]
    means = (weights @ sums.reshape(n, -1)) / (weights @ counts)[:, None]
    mean = sums.reshape(n, -1).sum(axis=0) / counts.sum()
    low, high = draws_interval(means, mean, n, confidence)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def share_positive(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return the share of groups with a mean above 0, ``[N, L, H]`` -> ``[L, H]``."""
    _, sums, _ = by_group(values, groups)
    return (sums > 0).mean(axis=0)


def family_p(values: np.ndarray, groups: Sequence[str], *, flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Return for each head the two-sided p against no effect, corrected for all heads, ``[N, L, H]`` -> ``[L, H]``.

    If a head has no effect, both signs of a group's sum are equally likely. All heads of a group are flipped jointly,
    which preserves their correlation. The statistic is ``|sum| / sqrt(sum of squares)`` over groups, whose denominator is
    invariant under flips. Each head is compared with the maximum statistic over heads (Westfall & Young 1993; sign flips
    as in Winkler et al. 2014, NeuroImage 92:381). If b of B flips are at least as large, ``p = (1 + b) / (1 + B)``, never
    0. With G groups no p is below ``2 ** (1 - G)`` in expectation.

    Parameters
    ----------
    values, groups
        Scores ``[N, n_layers, n_heads]`` and the group of each row.
    flips
        Number of flips B.
    seed
        Seed of the random flips.

    Raises
    ------
    ConfigError
        If `flips` is less than 1.
    """
    if flips < 1:
        msg = f"flips={flips} must be at least 1; the smallest p is 1 / (1 + flips)"
        raise ConfigError(msg)
    _, sums, _ = by_group(values, groups)
    flat = sums.reshape(len(sums), -1)  # [G, heads]
    size = np.sqrt((flat**2).sum(axis=0))
    scaled = np.divide(flat, size, out=np.zeros_like(flat), where=size > 0)
    signs = np.random.default_rng(seed).integers(0, 2, size=(flips, len(flat))) * 2.0 - 1.0
    largest = np.abs(signs @ scaled).max(axis=1)  # [flips]
    observed = np.abs(scaled.sum(axis=0))
    as_large = len(largest) - np.searchsorted(np.sort(largest), observed * (1 - _TIE))
    return ((1 + as_large) / (1 + flips)).reshape(values.shape[1:])


def stability(
    values: np.ndarray, groups: Sequence[str], k: int, *, splits: int = 200, confidence: float = 0.95, seed: int = 0
) -> Stability:
    """Split the groups into random halves and compare their rankings of heads; see `HeadScores.stability`."""
    _, sums, counts = by_group(values, groups)
    if len(counts) < 4:
        msg = f"stability needs at least 4 groups; got {len(counts)}"
        raise PatchError(msg)
    flat = sums.reshape(len(sums), -1)
    _check(k, splits, flat.shape[1], confidence)
    order = np.argsort(np.random.default_rng(seed).random((splits, len(flat))), axis=1)
    half = (order < len(flat) // 2).astype(np.float64)  # [splits, G]
    first, second = ((part @ flat) / (part @ counts)[:, None] for part in (half, 1 - half))
    return Stability(
        _range(spearman(first, second), confidence, splits),
        _range(overlap(first, second, k), confidence, splits),
        k,
        k / flat.shape[1],
    )


def compare_rows(
    a: GroupedScores,
    b: GroupedScores,
    k: Sequence[int],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankingComparison:
    """Compare two sets of scores of the same heads; see `circuits.compare`."""
    if a.values.shape[1:] != b.values.shape[1:] or not len(a.values) or not len(b.values):
        msg = f"scores {list(a.values.shape)} and {list(b.values.shape)} differ in layers or heads, or are empty"
        raise PatchError(msg)
    shape = a.values.shape[1:]
    heads = int(np.prod(shape))
    for count in k:
        _check(count, resamples, heads, confidence)
    names_a, sums_a, counts_a = by_group(a.values.reshape(-1, heads), a.groups)
    names_b, sums_b, counts_b = by_group(b.values.reshape(-1, heads), b.groups)
    weights_a, weights_b, sizes = _draw_jointly(names_a, names_b, resamples, seed)
    mean_a, mean_b = sums_a.sum(0) / counts_a.sum(), sums_b.sum(0) / counts_b.sum()
    means_a = (weights_a @ sums_a) / (weights_a @ counts_a)[:, None]  # [resamples, heads]
    means_b = (weights_b @ sums_b) / (weights_b @ counts_b)[:, None]
    n = sum(sizes)

    fewest = min(sizes[0] + sizes[2], sizes[1] + sizes[2])

    def estimate(value: np.ndarray, draws: np.ndarray, least: float) -> Estimate:
        low, high = draws_interval(draws, value[0], fewest, confidence)
        return Estimate(float(value[0]), max(float(low), least), min(float(high), 1.0), n, fewest < FEW_GROUPS)

    low, high = draws_interval(means_a - means_b, mean_a - mean_b, fewest, confidence)
    return RankingComparison(
        rank_correlation=estimate(spearman(mean_a[None], mean_b[None]), spearman(means_a, means_b), -1.0),
        overlap={
            count: estimate(overlap(mean_a[None], mean_b[None], count), overlap(means_a, means_b, count), 0.0)
            for count in k
        },
        difference=(mean_a - mean_b).reshape(shape),
        low=low.reshape(shape),
        high=high.reshape(shape),
        n_heads=heads,
        groups=sizes,
    )


def spearman(x: Float[np.ndarray, "r n"], y: Float[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the Spearman correlation of each row, with average ranks for ties; NaN if a row is constant."""
    import pandas as pd

    # Round first, so that rounding errors do not break ties.
    ranks = [pd.DataFrame(np.round(v, 9)).rank(axis=1).to_numpy(np.float64) for v in (x, y)]
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), size, out=np.full(len(x), np.nan), where=size > 0)


def overlap(x: Float[np.ndarray, "r n"], y: Float[np.ndarray, "r n"], k: int) -> Float[np.ndarray, " r"]:
    """Return for each row the share of the `k` largest of `x` that are among the `k` largest of `y`."""
    top = []
    for v in (x, y):
        mask = np.zeros(v.shape, bool)
        np.put_along_axis(mask, np.argsort(-v, axis=1, kind="stable")[:, :k], True, axis=1)
        top.append(mask)
    return (top[0] & top[1]).sum(axis=1) / k


def _draw_jointly(
    a: Sequence[str], b: Sequence[str], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Draw groups with replacement: shared groups jointly, other groups independently."""
    rng = np.random.default_rng(seed)
    shared = sorted(set(a) & set(b))
    parts = {"a": sorted(set(a) - set(b)), "b": sorted(set(b) - set(a)), "both": shared}
    weights: dict[str, np.ndarray] = {}
    for names in parts.values():
        if names:
            counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
            weights.update(zip(names, counts.T, strict=True))
    first, second = (np.stack([weights[name] for name in names], axis=1) for names in (a, b))
    return first, second, (len(parts["a"]), len(parts["b"]), len(shared))


def _range(draws: np.ndarray, confidence: float, n: int) -> Estimate:
    finite = draws[~np.isnan(draws)]
    if not len(finite):
        return Estimate(np.nan, np.nan, np.nan, n)
    low, middle, high = np.quantile(finite, [(1 - confidence) / 2, 0.5, (1 + confidence) / 2])
    return Estimate(float(middle), float(low), float(high), n)


def _check(k: int, repetitions: int, heads: int, confidence: float) -> None:
    if not 1 <= k <= heads:
        msg = f"k={k} must be between 1 and {heads} heads"
        raise PatchError(msg)
    if repetitions < 1 or not 0 < confidence < 1:
        msg = f"got {repetitions} repetitions and confidence={confidence}; pass at least 1 repetition and a confidence in (0, 1)"
        raise ConfigError(msg)
