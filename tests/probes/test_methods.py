"""Closed forms against scikit-learn and float64 loops; every estimator by scikit-learn's own checks."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss as reference_log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from probes import (
    ConceptSubspaceProbe,
    LDAProbe,
    LogisticProbe,
    MeanDifferenceProbe,
    MultinomialProbe,
    RidgeProbe,
    fit_grid,
)
from probes.protocol.scoring import (
    bootstrap_auc,
    calibration_error,
    log_loss,
    log_odds_slope,
    resample_groups,
    weighted_auc,
)
from tests.toys.memory_store import make_store

ALL = [
    LogisticProbe(),
    MultinomialProbe(),
    RidgeProbe(),
    LDAProbe(),
    MeanDifferenceProbe(),
    ConceptSubspaceProbe(n_probes=4),
]


@pytest.mark.filterwarnings("ignore:.*")  # the checks themselves warn
@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_estimators_keep_scikit_learns_contract(estimator) -> None:
    results = check_estimator(estimator, on_skip=None)
    assert len(results) > 40
    # What it leaves out itself is array API support, which scikit-learn has switched off by default.
    assert {r["check_name"] for r in results if r["status"] != "passed"} <= {"check_array_api_input"}


def data(n: int = 120, d: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * rng.uniform(0.1, 20, d) + rng.normal(size=d) * 5
    return x, (x[:, 0] + x[:, 0].std() * rng.normal(size=n) > x[:, 0].mean() + x[:, 0].std() * 0.5).astype(int)


@pytest.mark.parametrize("d", [8, 200])
@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0])
def test_ridge_equals_its_closed_form_and_scikit_learn(d: int, C: float) -> None:
    x, y = data(d=d)
    probe = RidgeProbe(C).fit(x, y)
    scaler = StandardScaler().fit(x)
    z, t = scaler.transform(x), 2.0 * y - 1
    w = np.linalg.solve(z.T @ z + np.eye(d) / C, z.T @ (t - t.mean()))
    np.testing.assert_allclose(probe.coef_[0] * scaler.scale_, w, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(w, Ridge(alpha=1 / C).fit(z, t).coef_, rtol=1e-7, atol=1e-10)
    means = [probe.decision_function(x)[y == v].mean() for v in (0, 1)]
    assert sum(means) == pytest.approx(0, abs=1e-9)
    assert means[1] > 0


def test_the_discriminant_equals_scikit_learns_but_for_the_prior() -> None:
    x, y = data()
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(StandardScaler().fit_transform(x), y)
    probe = LDAProbe(C=1e12).fit(x, y)
    z = StandardScaler().fit_transform(x)
    prior = np.log(y.mean() / (1 - y.mean()))
    np.testing.assert_allclose(probe.decision_function(x), reference.decision_function(z) - prior, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [8, 200])
def test_the_regularised_discriminant_equals_its_closed_form(d: int) -> None:
    x, y = data(d=d)
    C = 0.05
    z = StandardScaler().fit_transform(x)
    means = [z[y == v].mean(axis=0) for v in (0, 1)]
    within = sum((z[y == v] - means[v]).T @ (z[y == v] - means[v]) for v in (0, 1)) / len(z)
    w = np.linalg.solve(within + np.eye(d) / (C * len(z)), means[1] - means[0])
    margins = (z - 0.5 * (means[0] + means[1])) @ w
    np.testing.assert_allclose(LDAProbe(C).fit(x, y).decision_function(x), margins, rtol=1e-6, atol=1e-7)


def test_the_mean_difference_equals_its_formula() -> None:
    x, y = data()
    probe = MeanDifferenceProbe().fit(x, y)
    high, low = x[y == 1].mean(axis=0), x[y == 0].mean(axis=0)
    np.testing.assert_allclose(probe.coef_[0], high - low, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(probe.decision_function(x), (x - (high + low) / 2) @ (high - low), rtol=1e-8, atol=1e-8)


def test_the_logistic_probe_equals_scikit_learn() -> None:
    x, y = data()
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, tol=1e-10, class_weight="balanced")).fit(x, y)
    probe = LogisticProbe(0.3, tol=1e-12).fit(x, y)
    np.testing.assert_allclose(probe.decision_function(x), reference.decision_function(x), atol=1e-5)
    np.testing.assert_allclose(probe.predict_proba(x), reference.predict_proba(x), atol=1e-5)
    assert probe.gap_ <= 1e-12


def test_a_concept_subspace_is_the_distribution_of_its_probes() -> None:
    x, y = data(n=400)
    probe = ConceptSubspaceProbe(0.1, n_probes=40).fit(x, y)
    np.testing.assert_allclose(np.linalg.norm(probe.directions_, axis=1), 1)
    np.testing.assert_allclose(probe.mean_, probe.directions_.mean(axis=0))
    np.testing.assert_allclose(probe.variance_, probe.directions_.var(axis=0))
    samples = probe.sample(4000)
    np.testing.assert_allclose(np.linalg.norm(samples, axis=1), 1)
    np.testing.assert_allclose(samples.mean(axis=0), probe.mean_, atol=0.03)
    full = LogisticProbe(0.1).fit(x, y).coef_[0] * x.std(axis=0)
    assert probe.mean_ @ full / np.linalg.norm(probe.mean_) / np.linalg.norm(full) > 0.97
    # Each probe saw its own half: groups are taken whole, so fewer groups make directions differ more.
    grouped = ConceptSubspaceProbe(0.1, n_probes=40).fit(x, y, groups=np.arange(400) // 40)
    assert grouped.variance_.sum() > probe.variance_.sum()


@pytest.mark.parametrize("estimator", ["ridge", "lda", "mean_difference", "subspace"])
def test_every_method_finds_a_planted_concept(estimator: str) -> None:
    store = make_store()
    grid = fit_grid(store, ["object:apple"], estimator=estimator, C=(1e-3, 1e-1), control=0, folds=3)
    best = grid.best("object:apple")
    assert (best.layer, best.head) == (1, 2)
    assert best.balanced_accuracy > 0.75
    # Margins are log-odds or scaled to be: far better than knowing nothing.
    assert grid.array("object:apple", "log_loss")[1, 2] < 0.6
    assert grid.array("object:apple", "calibration")[1, 2] < 0.15
    assert np.abs(np.delete(grid.array("object:apple", "log_loss").ravel(), 6) - np.log(2)).max() < 0.1


# ---- scores ------------------------------------------------------------------------------------------------------------


def test_log_loss_and_calibration_equal_naive_ones() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(500) < 0.2).astype(float)
    margins = rng.normal(size=500) * 3 + 2 * y - 1
    weights = np.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    p = 1 / (1 + np.exp(-margins))
    assert log_loss(y, margins) == pytest.approx(reference_log_loss(y, p, sample_weight=weights), rel=1e-9)
    naive = 0.0
    for b in range(10):
        inside = (p >= b / 10) & (p < (b + 1) / 10)
        if inside.any():
            share = weights[inside].sum()
            naive += share * abs(
                np.average(p[inside], weights=weights[inside]) - weights[inside & (y == 1)].sum() / share
            )
    assert calibration_error(y, margins) == pytest.approx(naive, rel=1e-9)
    assert np.isnan(log_loss(np.ones(3), np.zeros(3)))
    assert np.isnan(calibration_error(np.ones(3), np.zeros(3)))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 300.0])
def test_the_calibration_slope_minimizes_log_loss(scale: float) -> None:
    rng = np.random.default_rng(1)
    y = (rng.random(400) < 0.3).astype(float)
    margins = (rng.normal(size=400) + 2 * y - 1) * scale
    slope = log_odds_slope(y, margins)
    best = min(np.geomspace(0.01, 100, 4001) / scale, key=lambda s: log_loss(y, s * margins))
    assert slope == pytest.approx(best, rel=5e-3)


def test_resampled_areas_by_group_equal_those_by_row() -> None:
    rng = np.random.default_rng(2)
    groups = rng.integers(0, 20, size=150)
    y, scores = (rng.random(150) < 0.4).astype(float), np.round(rng.normal(size=150), 1)
    _, of_row = np.unique(groups, return_inverse=True)
    counts = resample_groups(np.unique(groups), 50, 0)
    np.testing.assert_allclose(
        bootstrap_auc(y, scores, of_row, counts), weighted_auc(y, scores, counts[:, of_row]), rtol=1e-5
    )
    assert np.isnan(bootstrap_auc(np.ones(150), scores, of_row, counts)).all()
    labels, several = np.stack([y, 1 - y, np.zeros(150)]), np.stack([scores, scores**2, scores])
    areas = bootstrap_auc(labels, several, of_row, counts)
    for k in range(2):
        np.testing.assert_allclose(areas[:, k], weighted_auc(labels[k], several[k], counts[:, of_row]), rtol=1e-5)
    assert np.isnan(areas[:, 2]).all()
