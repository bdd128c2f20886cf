"""Intervals against the truth: how often they cover it, by simulation and, where it is known, exactly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom, norm, t

from circuits.faithfulness.curve import FaithfulCurve
from circuits.results.statistics import GroupedScores, compare_rows, mean_interval
from diagnosis.calibration import calibrate
from groundscope.core.intervals import combined_interval, rate_interval, share_interval, widen, wilson
from groundscope.core.statistics import (
    changes_of_columns,
    cluster_bootstrap,
    draws_interval,
    estimate,
    rates_of_columns,
)
from probes.protocol.scoring import auc, auc_interval, balanced_accuracy_interval, bootstrap_auc, resample_groups
from tests.toys.simulated_data import group_sizes, margins_by_group, means_by_group, rates_by_group

LOW_RATES = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06)


def covers(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    """Return how often intervals hold the truth."""
    return float(np.mean((low <= truth + 1e-12) & (high >= truth - 1e-12)))


def test_low_rates_of_independent_rows_are_covered_exactly() -> None:
    """The probability of every k of 125 is known; the bootstrap's intervals covered .86 at a rate of .025."""
    ends = np.array(rate_interval(np.arange(126)[:, None] * np.eye(1), np.full((126, 1), 125)))
    hits = np.zeros((126, 125))
    for k in range(126):
        hits[k, :k] = 1
    low, high = rate_interval(hits, np.ones((126, 125)))
    assert low == pytest.approx([wilson(k, 125)[0] for k in range(126)])
    assert high == pytest.approx([wilson(k, 125)[1] for k in range(126)])
    chance = binom.pmf(np.arange(126), 125, np.array(LOW_RATES)[:, None])
    covered = [(c * ((low <= p) & (high >= p))).sum() for c, p in zip(chance, LOW_RATES, strict=True)]
    assert 0.93 <= np.mean(covered) <= 0.97
    assert min(covered) >= 0.90
    assert ends.shape == (2, 126)
    interval = estimate([1] + [0] * 124, range(125))
    assert (round(interval.low, 4), round(interval.high, 4), interval.few_groups) == (0.0014, 0.0439, False)


@pytest.mark.parametrize("n", [5, 8, 12, 20, 35, 60])
def test_low_rates_of_few_rows_are_covered_exactly(n: int) -> None:
    """Wilson's own interval covers some of these rates in 84 % of samples only."""
    rows = (np.arange(n) < np.arange(n + 1)[:, None]).astype(float)
    low, high = rate_interval(rows, np.ones_like(rows))
    for p in (*LOW_RATES, 0.94, 0.97, 0.99):
        chance = binom.pmf(np.arange(n + 1), n, p)
        assert (chance * ((low <= p) & (high >= p))).sum() >= 0.90, p


@pytest.mark.parametrize("groups", [8, 60])
@pytest.mark.parametrize("size", [6, "unlike"])
@pytest.mark.parametrize("agreement", [0, 0.3, 1])
def test_rates_of_groups_are_covered(groups: int, size: int | str, agreement: float) -> None:
    rng = np.random.default_rng(0)
    covered = []
    for rate in (0.01, 0.04, 0.2, 0.5, 0.94):
        hits, trials = rates_by_group(group_sizes(size, (400, groups), rng), rate, agreement, rng)
        covered.append(covers(*rate_interval(hits, trials), rate))
    assert min(covered) >= 0.90, covered


def test_an_interval_of_few_groups_is_flagged() -> None:
    few, many = (estimate([1, 0] * n, range(2 * n)) for n in (4, 5))
    assert (few.few_groups, many.few_groups) == (True, False)
    assert str(few).endswith("(few groups)")
    assert not str(many).endswith("(few groups)")


def test_ratings_that_vary_little_have_narrow_intervals() -> None:
    """A rating is no yes or no: its spread is its own."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        values = np.clip(rng.normal(0.7, 0.1, 60), 0, 1)
        interval = estimate(values, [i // 2 for i in range(60)])
        covered.append(interval.low <= 0.7 <= interval.high)
        assert interval.high - interval.low < 0.15
    assert 0.9 <= np.mean(covered) <= 1.0
    same = estimate([0.5] * 20, range(20))
    assert same.low < 0.5 < same.high


@pytest.mark.parametrize("groups", [12, 100])
def test_changes_are_covered(groups: int) -> None:
    """Two systems on the same questions: gains and losses of an image go together."""
    rng = np.random.default_rng(1)
    for gain, loss in ((0.01, 0.01), (0.05, 0.0), (0.3, 0.1)):
        covered = []
        for _ in range(200):
            prone = rng.random(groups) < 0.5  # images in which anything changes
            index = np.repeat(np.arange(groups), 3)
            draw = rng.random(len(index))
            change = np.where(draw < 2 * gain, 1.0, np.where(draw < 2 * gain + 2 * loss, -1.0, 0.0)) * prone[index]
            low, high = changes_of_columns(change, index.tolist())
            covered.append(low <= gain - loss <= high)
        assert np.mean(covered) >= 0.90, (gain, loss, np.mean(covered))


def test_intervals_of_columns_equal_those_of_each_column_alone() -> None:
    rng = np.random.default_rng(2)
    groups = [f"g{i // 3}" for i in range(60)]
    rates = rng.random((60, 2, 3)) < 0.2
    changes = rng.integers(-1, 2, (60, 4))
    low, high = rates_of_columns(rates, groups)
    assert low.shape == (2, 3)
    interval = estimate(rates[:, 1, 2], groups)
    assert (low[1, 2], high[1, 2]) == pytest.approx((interval.low, interval.high))
    low, high = changes_of_columns(changes, groups)
    assert (low[2], high[2]) == pytest.approx(np.ravel(changes_of_columns(changes[:, 2], groups)))
    turned_low, turned_high = changes_of_columns(-changes, groups)
    np.testing.assert_allclose((turned_low, turned_high), (-high, -low), atol=1e-12)


def test_a_combination_is_by_hand() -> None:
    """Zou and Donner's distances for two rates of other groups, which are uncorrelated."""
    hits = np.array([[1.0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1, 1]])
    trials = np.array([[1.0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    (a_low, b_low), (a_high, b_high) = rate_interval(hits, trials)
    low, high = combined_interval(hits, trials, (1, -1))
    assert low == pytest.approx(0 - np.hypot(0.75 - a_low, b_high - 0.75))
    assert high == pytest.approx(0 + np.hypot(a_high - 0.75, 0.75 - b_low))
    assert np.isnan(combined_interval(hits, 0 * trials, (0.5, 0.5))).all()


@pytest.mark.parametrize("groups", [10, 60])
@pytest.mark.parametrize("distance", [0.0, 2.0, 5.0])
def test_balanced_accuracies_and_areas_are_covered(groups: int, distance: float) -> None:
    """At a distance of 5, percentiles of draws cover the area in 4 to 80 % of samples: they end at what was seen."""
    rng = np.random.default_rng(3)
    covered = []
    for seed in range(120):
        labels, margins, index = margins_by_group(groups, distance, 0.4, rng)
        if not 0 < labels.sum() < len(labels):
            continue
        low, high = balanced_accuracy_interval(labels, margins[None], index, groups)
        counts = resample_groups(np.arange(groups), 150, seed)
        draws = bootstrap_auc(labels, margins[None], index, counts)
        values = np.array([auc(labels, margins)])
        area_low, area_high = auc_interval(labels, values, draws, index, groups)
        truths = norm.cdf(distance / 2), norm.cdf(distance / np.sqrt(2))
        covered.append((covers(low, high, truths[0]), covers(area_low, area_high, truths[1])))
    assert (np.mean(covered, axis=0) >= 0.90).all(), np.mean(covered, axis=0)


def test_a_widened_interval_of_equal_groups_is_students() -> None:
    """With normal draws of the bootstrap's spread, the ends are those of a t interval."""
    rng = np.random.default_rng(4)
    for n in (4, 9, 40):
        x = rng.normal(size=n)
        spread = x.std() / np.sqrt(n)  # what draws of groups have
        z = norm.ppf(0.975)
        low, high = widen(x.mean(), x.mean() - z * spread, x.mean() + z * spread, n)
        assert (low, high) == pytest.approx(t.interval(0.95, n - 1, x.mean(), x.std(ddof=1) / np.sqrt(n)))
    assert np.isnan(widen(0.0, -1.0, 1.0, 1)).all()
    low, high = draws_interval(rng.normal(size=(500, 2)), np.zeros(2), np.array([5, 500]))
    assert high[0] - low[0] > 1.4 * (high[1] - low[1])


@pytest.mark.parametrize(("kind", "groups", "least"), [("normal", 4, 0.88), ("normal", 15, 0.90), ("skewed", 60, 0.87)])
def test_means_of_groups_are_covered(kind: str, groups: int, least: float) -> None:
    """Percentiles alone cover .78 of the means of four normal groups."""
    rng = np.random.default_rng(5)
    covered, by_rows = [], []
    for seed in range(200):
        values, index, truth = means_by_group(kind, groups, rng)
        low, high = cluster_bootstrap(values, index.tolist(), resamples=300, seed=seed)
        covered.append(low <= truth <= high)
        head_low, head_high = mean_interval(values[:, None], [str(i) for i in index], resamples=300, seed=seed)
        by_rows.append(covers(head_low, head_high, truth))
    assert np.mean(covered) >= least
    assert np.mean(by_rows) >= least


def test_differences_of_head_scores_are_covered() -> None:
    rng = np.random.default_rng(6)
    covered = []
    for seed in range(150):
        shared = rng.normal(size=(6, 1, 1))
        a, b = (GroupedScores(shared + rng.normal(mean, 1, (6, 1, 4)), tuple("abcdef")) for mean in (1.0, 0.0))
        comparison = compare_rows(a, b, [1], resamples=200, seed=seed)
        assert comparison.rank_correlation.few_groups
        covered.append(covers(comparison.low, comparison.high, 1.0))
    assert np.mean(covered) >= 0.91


def test_areas_under_curves_of_faithfulness_are_covered() -> None:
    """F of a curve whose truth is .2, .6 and 1 of a gap of 2."""
    rng = np.random.default_rng(7)
    covered = []
    for seed in range(200):
        gap = 2 + rng.normal(size=8)
        margins = gap[:, None] * np.array([0.2, 0.6, 1.0]) + 0.5 * rng.normal(size=(8, 3))
        curve = FaithfulCurve(
            (0.1, 0.5, 1.0), margins, gap, np.zeros(8), tuple("abcdefgh"), tuple(SimpleNamespace() for _ in range(3))
        )  # pyright: ignore[reportArgumentType]  # sizes are not asked for
        interval = curve.interval(resamples=200, seed=seed)
        assert interval.few_groups
        covered.append(interval.low <= 0.4 * 0.4 + 0.5 * 0.8 <= interval.high)
    assert np.mean(covered) >= 0.90


def test_the_accuracy_of_a_stage_is_covered_and_never_certain() -> None:
    rng = np.random.default_rng(8)
    groups = [f"g{i // 2}" for i in range(40)]
    covered = []
    for _ in range(100):
        margins = rng.normal(size=40) + norm.ppf(0.9)
        interval = calibrate([np.array([m]) for m in margins], np.ones(40), groups, np.ones(40, bool), 1)
        covered.append(interval.low <= 0.9 <= interval.high)
    assert np.mean(covered) >= 0.90
    sure = calibrate([np.array([5.0])] * 40, np.arange(40) % 2, groups, np.ones(40, bool), 1)
    assert sure.accuracy == 1
    assert 0.8 < sure.low < 0.97


def test_shares_without_variance_have_a_width() -> None:
    low, high = share_interval(1.0, 0.0, 20, 10)
    assert (low, high) == pytest.approx(wilson(20, 20))
    # A variance as of 30 trials: Wilson's, with Student's quantile.
    low, high = share_interval(0.7, 0.7 * 0.3 / 30, 1000, 10**6)
    assert (low, high) == pytest.approx(wilson(21, 30), abs=1e-4)
