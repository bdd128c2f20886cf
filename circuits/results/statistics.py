"""How far scores of heads are to be believed: groups drawn anew, signs flipped, halves compared.

Pairs of one scene rise and fall together, so the unit is the group everywhere: whole groups are drawn, flipped or
divided. Effects are summed by group once, and each repetition is then one row of a matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.statistics import FEW_GROUPS, Estimate, draws_interval

_TIE = 1e-9
"""Statistics closer than this, relatively, are equal: sums of the same numbers in another order."""


@dataclass(frozen=True)
class Stability:
    """How alike two halves of the groups rank the heads, over random halves."""

    rank_correlation: Estimate
    """Median Spearman correlation of the two halves' mean effects over all heads, and the range of the splits."""
    overlap: Estimate
    """Median share of the `k` heads of largest mean effect in one half that are among those of the other, and range."""
    k: int
    chance: float
    """Overlap to be expected of unrelated rankings: ``k`` over the number of heads."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """How alike two sets of scores rank the heads, with bootstrap intervals over groups; made by `circuits.compare`."""

    rank_correlation: Estimate
    """Spearman correlation of the mean scores over all heads."""
    overlap: Mapping[int, Estimate]
    """For each ``k`` the share of the top ``k`` heads of one that are among the top ``k`` of the other."""
    difference: np.ndarray
    """Mean of the first minus mean of the second, float64 ``[n_layers, n_heads]``; paired where groups are shared."""
    low: np.ndarray
    high: np.ndarray
    n_heads: int
    groups: tuple[int, int, int]
    """Number of groups in the first only, in the second only, and in both."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlap", MappingProxyType(dict(self.overlap)))
        for name in ("difference", "low", "high"):
            getattr(self, name).setflags(write=False)

    def chance(self, k: int) -> float:
        """Return the overlap at `k` to be expected of unrelated rankings."""
        return k / self.n_heads


@dataclass(frozen=True, eq=False)
class Rows:
    """Scores by row, and the group each row belongs to."""

    values: np.ndarray
    """``[N, n_layers, n_heads]``, finite."""
    groups: tuple[str, ...]


def by_group(values: np.ndarray, groups: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the groups' names in order, their sums float64 ``[G, ...]``, and their numbers of rows ``[G]``."""
    names, index = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values.astype(np.float64))
    return names.tolist(), sums, np.bincount(index)


def mean_interval(
    values: np.ndarray, groups: Sequence[str], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bootstrap interval over groups of the mean over rows, ``[N, ...]`` -> twice ``[...]``.

    Percentiles, moved apart for the number of groups (`groundscope.core.intervals.widen`); NaN for a single group.
    """
    _, sums, counts = by_group(values, groups)
    n = len(counts)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, groups]
    means = (weights @ sums.reshape(n, -1)) / (weights @ counts)[:, None]
    mean = sums.reshape(n, -1).sum(axis=0) / counts.sum()
    low, high = draws_interval(means, mean, n, level)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def share_positive(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return the share of groups whose mean is above 0, ``[N, L, H]`` -> ``[L, H]``."""
    _, sums, _ = by_group(values, groups)
    return (sums > 0).mean(axis=0)


def family_p(values: np.ndarray, groups: Sequence[str], flips: int = 2000, seed: int = 0) -> np.ndarray:
    """Return for each head the two-sided p against no effect, corrected for all heads, ``[N, L, H]`` -> ``[L, H]``.

    If a head does nothing, a group's sum is as likely to have one sign as the other. All heads of a group are flipped
    together, which keeps how they hang together; the statistic is ``|sum| / sqrt(sum of squares)`` over groups, whose
    denominator flips leave alone; and each head is compared with the largest statistic of any head (the maximum
    statistic of Westfall & Young 1993; sign flips as in Winkler et al. 2014, NeuroImage 92:381). With b of B flips as
    large, ``p = (1 + b) / (1 + B)``: never 0. With G groups no p is under ``2 ** (1 - G)`` in expectation.

    Parameters
    ----------
    values, groups
        Scores ``[N, n_layers, n_heads]`` and the group of each row.
    flips
        B.
    seed
        Decides the flips.

    Raises
    ------
    ConfigError
        For less than one flip.
    """
    if flips < 1:
        msg = f"flips={flips}: at least 1 is needed, and p is never under 1 / (1 + flips)"
        raise ConfigError(msg)
    _, sums, _ = by_group(values, groups)
    flat = sums.reshape(len(sums), -1)  # [G, heads]
    size = np.sqrt((flat**2).sum(axis=0))
    scaled = np.divide(flat, size, out=np.zeros_like(flat), where=size > 0)
    signs = np.random.default_rng(seed).integers(0, 2, size=(flips, len(flat))) * 2.0 - 1.0
    largest = np.abs(signs @ scaled).max(axis=1)  # [flips]
    seen = np.abs(scaled.sum(axis=0))
    as_large = len(largest) - np.searchsorted(np.sort(largest), seen * (1 - _TIE))
    return ((1 + as_large) / (1 + flips)).reshape(values.shape[1:])


def stability(
    values: np.ndarray, groups: Sequence[str], k: int, splits: int = 200, seed: int = 0, level: float = 0.95
) -> Stability:
    """Divide the groups into random halves and compare how they rank the heads; see `HeadScores.stability`."""
    _, sums, counts = by_group(values, groups)
    if len(counts) < 4:
        msg = f"{len(counts)} groups cannot be divided into halves that say anything: at least 4 are needed"
        raise PatchError(msg)
    flat = sums.reshape(len(sums), -1)
    _check(k, splits, flat.shape[1], level)
    order = np.argsort(np.random.default_rng(seed).random((splits, len(flat))), axis=1)
    half = (order < len(flat) // 2).astype(np.float64)  # [splits, G]
    first, second = ((part @ flat) / (part @ counts)[:, None] for part in (half, 1 - half))
    return Stability(
        _range(spearman(first, second), level, splits),
        _range(overlap(first, second, k), level, splits),
        k,
        k / flat.shape[1],
    )


def compare_rows(
    a: Rows, b: Rows, k: Sequence[int], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Comparison:
    """Compare two sets of scores of the same heads; see `circuits.compare`."""
    if a.values.shape[1:] != b.values.shape[1:] or not len(a.values) or not len(b.values):
        msg = f"scores {list(a.values.shape)} and {list(b.values.shape)} are not of the same layers and heads, or empty"
        raise PatchError(msg)
    shape = a.values.shape[1:]
    heads = int(np.prod(shape))
    for one in k:
        _check(one, resamples, heads, level)
    names_a, sums_a, counts_a = by_group(a.values.reshape(-1, heads), a.groups)
    names_b, sums_b, counts_b = by_group(b.values.reshape(-1, heads), b.groups)
    drawn_a, drawn_b, sizes = _draw_together(names_a, names_b, resamples, seed)
    mean_a, mean_b = sums_a.sum(0) / counts_a.sum(), sums_b.sum(0) / counts_b.sum()
    means_a = (drawn_a @ sums_a) / (drawn_a @ counts_a)[:, None]  # [resamples, heads]
    means_b = (drawn_b @ sums_b) / (drawn_b @ counts_b)[:, None]
    n = sum(sizes)

    fewest = min(sizes[0] + sizes[2], sizes[1] + sizes[2])

    def measured(value: np.ndarray, draws: np.ndarray, least: float) -> Estimate:
        low, high = draws_interval(draws, value[0], fewest, level)
        return Estimate(float(value[0]), max(float(low), least), min(float(high), 1.0), n, fewest < FEW_GROUPS)

    low, high = draws_interval(means_a - means_b, mean_a - mean_b, fewest, level)
    return Comparison(
        rank_correlation=measured(spearman(mean_a[None], mean_b[None]), spearman(means_a, means_b), -1.0),
        overlap={
            one: measured(overlap(mean_a[None], mean_b[None], one), overlap(means_a, means_b, one), 0.0) for one in k
        },
        difference=(mean_a - mean_b).reshape(shape),
        low=low.reshape(shape),
        high=high.reshape(shape),
        n_heads=heads,
        groups=sizes,
    )


def spearman(x: Float[np.ndarray, "r n"], y: Float[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Return the Spearman correlation of each row, ties ranked in the middle; NaN where a row is constant."""
    import pandas as pd

    # What float rounding tells apart is not a difference of rank.
    ranks = [pd.DataFrame(np.round(v, 9)).rank(axis=1).to_numpy(np.float64) for v in (x, y)]
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), size, out=np.full(len(x), np.nan), where=size > 0)


def overlap(x: Float[np.ndarray, "r n"], y: Float[np.ndarray, "r n"], k: int) -> Float[np.ndarray, " r"]:
    """Return for each row the share of the `k` largest of one that are among the `k` largest of the other."""
    top = []
    for v in (x, y):
        mask = np.zeros(v.shape, bool)
        np.put_along_axis(mask, np.argsort(-v, axis=1, kind="stable")[:, :k], True, axis=1)
        top.append(mask)
    return (top[0] & top[1]).sum(axis=1) / k


def _draw_together(
    a: Sequence[str], b: Sequence[str], resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Draw groups with replacement: those in both for both at once, those in one only apart from them."""
    rng = np.random.default_rng(seed)
    shared = sorted(set(a) & set(b))
    parts = {"a": sorted(set(a) - set(b)), "b": sorted(set(b) - set(a)), "both": shared}
    drawn: dict[str, np.ndarray] = {}
    for names in parts.values():
        if names:
            counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
            drawn.update(zip(names, counts.T, strict=True))
    first, second = (np.stack([drawn[name] for name in names], axis=1) for names in (a, b))
    return first, second, (len(parts["a"]), len(parts["b"]), len(shared))


def _range(draws: np.ndarray, level: float, n: int) -> Estimate:
    known = draws[~np.isnan(draws)]
    if not len(known):
        return Estimate(np.nan, np.nan, np.nan, n)
    low, middle, high = np.quantile(known, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return Estimate(float(middle), float(low), float(high), n)


def _check(k: int, repetitions: int, heads: int, level: float) -> None:
    if not 1 <= k <= heads:
        msg = f"top {k}: there are {heads} heads"
        raise PatchError(msg)
    if repetitions < 1 or not 0 < level < 1:
        msg = f"{repetitions} repetitions at level {level}: at least 1, and a level between 0 and 1, are needed"
        raise ConfigError(msg)
