"""Scores against scikit-learn and naive loops; intervals against their nominal rate."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from groundscope.core.statistics import draws_interval, wilson
from probes.protocol.scoring import (
    auc,
    auc_interval,
    balanced_accuracy,
    balanced_accuracy_interval,
    bootstrap_auc,
    class_totals,
    difference_interval,
    resample_groups,
    weighted_auc,
)


@pytest.mark.parametrize("seed", range(8))
def test_scores_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = (rng.random(90) < 0.25).astype(float)
    margins = rng.normal(size=(3, 90)) + y
    margins[2] = np.round(margins[2])  # ties
    for at, row in enumerate(margins):
        assert balanced_accuracy(y, margins)[at] == pytest.approx(balanced_accuracy_score(y, row > 0), abs=1e-12)
        assert auc(y, row) == pytest.approx(roc_auc_score(y, row), abs=1e-12)
        weights = rng.integers(0, 4, size=(5, 90)).astype(np.float32)
        for w, got in zip(weights, weighted_auc(y, row, weights), strict=True):
            assert got == pytest.approx(roc_auc_score(y, row, sample_weight=w), abs=1e-6)


def test_a_score_without_both_classes_is_undefined() -> None:
    assert np.isnan(balanced_accuracy(np.ones(4), np.zeros((2, 4)))).all()
    assert np.isnan(auc(np.zeros(4), np.arange(4.0)))


def test_resampled_scores_equal_those_of_the_rows_written_out() -> None:
    rng = np.random.default_rng(0)
    groups = rng.choice([f"g{i}" for i in range(12)], size=60)
    y, margins = (rng.random(60) < 0.5).astype(float), rng.normal(size=(2, 60))
    weights = resample_groups(groups, 20, seed=1)
    n_groups = len(np.unique(groups))
    for name in np.unique(groups):  # a group is drawn whole
        assert (weights[:, groups == name] == weights[:, groups == name][:, :1]).all()
    first = [np.flatnonzero(groups == name)[0] for name in np.unique(groups)]
    assert (weights[:, first].sum(axis=1) == n_groups).all()
    of_row = np.unique(groups, return_inverse=True)[1]
    hits, trials = class_totals(y, margins, of_row, n_groups)
    for b in range(20):
        rows = np.repeat(np.arange(60), weights[b].astype(int))
        times = weights[b, first]
        for m in range(2):
            score = np.mean((hits[:, m] @ times) / (trials[:, m] @ times))
            assert score == pytest.approx(balanced_accuracy_score(y[rows], margins[m, rows] > 0), abs=1e-6)


def test_clustered_intervals_cover_at_their_nominal_rate_where_independent_ones_do_not() -> None:
    """Groups of five rows that are right or wrong together: the truth is 0.5 by construction."""
    rng = np.random.default_rng(0)
    covered = {"group": 0, "row": 0}
    trials = 300
    for _ in range(trials):
        groups = np.repeat(np.arange(60), 5)
        y = np.repeat(rng.permutation(np.arange(60) % 2), 5).astype(float)
        margins = (np.repeat(rng.normal(size=60), 5) + 0.3 * rng.normal(size=300))[None]
        for kind, units in (("group", groups), ("row", np.arange(300))):
            names, of_row = np.unique(units, return_inverse=True)
            low, high = balanced_accuracy_interval(y, margins, of_row, len(names))
            covered[kind] += int(low[0] <= 0.5 <= high[0])
    low, high = wilson(covered["group"], trials, confidence=0.999)
    assert low <= 0.95 <= high, covered
    assert covered["row"] < 0.8 * trials


def test_undefined_draws_are_left_out_of_an_interval() -> None:
    draws = np.array([[0.0, np.nan], [1.0, np.nan], [np.nan, np.nan]])
    low, high = draws_interval(draws, np.array([0.5, np.nan]), groups=10**9, confidence=1 - 1e-9)
    np.testing.assert_allclose([low[0], high[0]], [0, 1], atol=1e-6)
    assert np.isnan([low[1], high[1]]).all()


def test_a_score_that_is_always_right_is_not_certain() -> None:
    """Percentiles of draws gave [1, 1] for three images as for three hundred."""
    widths = []
    for n in (8, 80):
        y, groups = np.arange(n) % 2 * 1.0, np.arange(n)
        margins = (2 * y - 1)[None]
        low, high = balanced_accuracy_interval(y, margins, groups, n)
        assert high[0] == 1
        draws = bootstrap_auc(y, margins, groups, np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 100))
        area_low, area_high = auc_interval(y, np.ones(1), draws, groups, n)
        assert area_high[0] == 1
        # Of n / 2 right answers in each class, the mean of both.
        assert low[0] == pytest.approx(1 - np.sqrt(2) / 2 * (1 - wilson(n // 2, n // 2)[0]))
        widths.append((1 - low[0], 1 - area_low[0]))
    assert (np.array(widths[0]) > 2 * np.array(widths[1])).all()
    assert (np.array(widths[1]) > 0.02).all()


def test_paired_differences_are_narrower_than_those_of_other_groups() -> None:
    rng = np.random.default_rng(3)
    y = rng.permutation(np.arange(80) % 2).astype(float)
    first = (y * 2 - 1 + rng.normal(size=80))[None]
    second = first + 0.3 * rng.normal(size=(1, 80))
    of_row = np.arange(80)
    low, high = difference_interval(class_totals(y, first, of_row, 80), class_totals(y, second, of_row, 80))
    value = balanced_accuracy(y, first)[0] - balanced_accuracy(y, second)[0]
    assert low[0] < value < high[0]
    unpaired = (class_totals(y, first, of_row, 160), class_totals(y, second, of_row + 80, 160))
    wide_low, wide_high = difference_interval(*unpaired)
    assert wide_high[0] - wide_low[0] > 1.5 * (high[0] - low[0])
