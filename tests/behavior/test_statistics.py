"""Intervals clustered by group, against naive loops, closed forms and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from groundscope.core.errors import ConfigError, DataError
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, estimate, ratio, wilson


def naive(values: np.ndarray, groups: list[str], draws: int, seed: int) -> np.ndarray:
    """Resample groups one at a time and take the mean of all their rows."""
    rng = np.random.default_rng(seed)
    names = sorted(set(groups))
    rows = {name: [v for v, g in zip(values, groups, strict=True) if g == name] for name in names}
    means = []
    for _ in range(draws):
        sample = [v for i in rng.integers(0, len(names), size=len(names)) for v in rows[names[i]]]
        means.append(np.mean(sample))
    return np.array(means)


def clustered(rng: np.random.Generator, n_groups: int, per_group: int, share: float) -> tuple[np.ndarray, list[str]]:
    """Draw answers whose rate differs from group to group."""
    rates = rng.beta(share * 3, (1 - share) * 3, size=n_groups)
    values = rng.random((n_groups, per_group)) < rates[:, None]
    return values.ravel(), [f"g{i}" for i in range(n_groups) for _ in range(per_group)]


@pytest.mark.parametrize("kind", ["few kinds of groups", "all groups different"])
def test_bootstrap_agrees_with_resampling_groups_one_by_one(kind: str) -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 6, size=150)
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    shift = np.repeat(rng.random(150), sizes)
    values = shift + rng.normal(size=len(groups)) if kind.startswith("all") else rng.random(len(groups)) < shift
    expected = np.quantile(naive(values.astype(float), groups, 4000, 0), [0.025, 0.975])
    interval = cluster_bootstrap(values, groups, resamples=20000)
    width = expected[1] - expected[0]
    assert np.allclose(interval, expected, atol=0.06 * width)


def test_bootstrap_of_a_ratio_agrees_with_resampling() -> None:
    rng = np.random.default_rng(2)
    below = rng.integers(1, 9, size=80)
    above = rng.binomial(below, 0.3)
    picks = np.random.default_rng(3).integers(0, 80, size=(8000, 80))
    expected = np.quantile(above[picks].sum(1) / below[picks].sum(1), [0.025, 0.975])
    interval = cluster_bootstrap(np.stack([above, below], axis=1), range(80), ratio, resamples=8000)
    assert np.allclose(interval, expected, atol=0.01)


def test_bootstrap_does_not_depend_on_names_or_repeat_differently() -> None:
    values, groups = clustered(np.random.default_rng(4), 40, 3, 0.7)
    assert cluster_bootstrap(values, groups) == cluster_bootstrap(values, [f"other {g}" for g in groups])
    assert cluster_bootstrap(values, groups, seed=1) != cluster_bootstrap(values, groups, seed=2)


def test_coverage_is_near_its_level_where_rows_of_a_group_agree() -> None:
    """Drawing rows instead of groups would cover far less often: that is why groups are drawn."""
    rng = np.random.default_rng(5)
    by_group = by_row = 0
    rounds = 300
    for number in range(rounds):
        values, groups = clustered(rng, 60, 8, 0.7)
        low, high = cluster_bootstrap(values, groups, resamples=400, seed=number)
        by_group += low <= 0.7 <= high
        low, high = cluster_bootstrap(values, range(len(values)), resamples=400, seed=number)
        by_row += low <= 0.7 <= high
    assert 0.90 <= by_group / rounds <= 0.985
    assert by_row / rounds < 0.85


@pytest.mark.parametrize("share", [0.9, 0.99])
@pytest.mark.parametrize("n_groups", [5, 40])
def test_estimate_covers_with_few_groups_and_near_the_ends(n_groups: int, share: float) -> None:
    rng = np.random.default_rng(6)
    rounds = 300
    covered = 0
    for _ in range(rounds):
        interval = estimate(rng.random(n_groups) < share, range(n_groups))
        covered += interval.low <= share <= interval.high
    assert covered / rounds >= 0.85


@given(st.integers(0, 60), st.integers(0, 60))
def test_wilson_is_scipys(k: int, more: int) -> None:
    n = k + more
    low, high = wilson(k, n)
    if n == 0:
        assert (low, high) == (0, 1)
        return
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert low < high


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("n_groups", [1, 3, 200])
def test_estimate_is_never_certain(value: bool, n_groups: int) -> None:
    interval = estimate([value] * (2 * n_groups), [i // 2 for i in range(2 * n_groups)])
    assert interval.value == value
    assert (interval.low, interval.high) == pytest.approx(wilson(n_groups * value, n_groups))
    assert interval.low < interval.high
    assert interval.n == 2 * n_groups


def test_estimate_leaves_out_groups_that_count_nothing() -> None:
    interval = estimate([1, 1, 1, 0, 0], "abcde", [1, 1, 1, 0, 0])
    assert (interval.low, interval.high) == pytest.approx(wilson(3, 3))
    assert interval.n == 3


def test_independent_rows_have_wilsons_interval() -> None:
    """1 of 125 was [0, .024] from a bootstrap, which covers a rate of .025 in 86 % of samples."""
    interval = estimate([1] + [0] * 124, range(125))
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0014, 0.0439)
    for k in range(0, 126, 7):
        interval = estimate([1] * k + [0] * (125 - k), range(125))
        assert (interval.low, interval.high) == pytest.approx(wilson(k, 125))
    values = [True, False] * FEW_GROUPS
    assert estimate(values, range(2 * FEW_GROUPS)) == Estimate(0.5, *wilson(10, 20), 20)


def test_nothing_measured_is_nan() -> None:
    assert all(math.isnan(v) for v in cluster_bootstrap([], []))
    assert all(math.isnan(v) for v in cluster_bootstrap([1.0, 2.0], "aa"))  # one group says nothing of others
    interval = estimate([0, 0], "ab", [0, 0])
    assert math.isnan(interval.value)
    assert math.isnan(interval.low)
    assert interval.n == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="2 groups for 3 rows"):
        cluster_bootstrap([1, 2, 3], "ab")
    with pytest.raises(ConfigError, match="confidence=95"):
        cluster_bootstrap([1, 2], "ab", confidence=95)
    with pytest.raises(ConfigError, match="k=3 of n=2"):
        wilson(3, 2)
