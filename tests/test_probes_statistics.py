"""Scores against scikit-learn and naive loops; intervals against their nominal rate."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from groundscope.core.statistics import wilson
from probes.protocol.scoring import (
    auc,
    balanced_accuracy,
    bootstrap_balanced_accuracy,
    percentile_interval,
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
    drawn = bootstrap_balanced_accuracy(y, margins, of_row, weights[:, first])
    for b in range(20):
        rows = np.repeat(np.arange(60), weights[b].astype(int))
        for m in range(2):
            assert drawn[b, m] == pytest.approx(balanced_accuracy_score(y[rows], margins[m, rows] > 0), abs=1e-6)


def test_clustered_intervals_cover_at_their_nominal_rate_where_independent_ones_do_not() -> None:
    """Groups of five rows that are right or wrong together: the truth is 0.5 by construction."""
    rng = np.random.default_rng(0)
    covered = {"group": 0, "row": 0}
    trials = 300
    for trial in range(trials):
        groups = np.repeat(np.arange(60), 5)
        y = np.repeat(rng.permutation(np.arange(60) % 2), 5).astype(float)
        margins = (np.repeat(rng.normal(size=60), 5) + 0.3 * rng.normal(size=300))[None]
        for kind, units in (("group", groups), ("row", np.arange(300))):
            _, first, of_row = np.unique(units, return_index=True, return_inverse=True)
            counts = resample_groups(units, 400, seed=trial)[:, first]
            draws = bootstrap_balanced_accuracy(y, margins, of_row, counts)
            low, high = percentile_interval(draws)
            covered[kind] += int(low[0] <= 0.5 <= high[0])
    low, high = wilson(covered["group"], trials, level=0.999)
    assert low <= 0.95 <= high, covered
    assert covered["row"] < 0.8 * trials


def test_undefined_draws_are_left_out_of_an_interval() -> None:
    low, high = percentile_interval(np.array([[0.0, np.nan], [1.0, np.nan], [np.nan, np.nan]]), confidence=1 - 1e-9)
    np.testing.assert_allclose([low[0], high[0]], [0, 1], atol=1e-6)
    assert np.isnan([low[1], high[1]]).all()
