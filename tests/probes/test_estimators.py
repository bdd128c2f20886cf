"""Estimators of a grid: the open registry, scikit-learn classifiers, and the rows and sites that a grid uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

import probes
from groundscope.core.errors import ConfigError, ProbeError, SiteError
from probes import fit_grid
from tests.toys.memory_store import PLANTED, MemoryStore, make_store


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_store()


@pytest.fixture
def registered() -> Iterator[str]:
    probes.estimators.register("half_ridge", replace(probes.estimators["ridge"], description="ridge, again"))
    yield "half_ridge"
    probes.estimators.unregister("half_ridge")


def test_a_registered_estimator_is_used_by_name(store: MemoryStore, registered: str) -> None:
    options = {"control": 0, "folds": 2, "resamples": 2, "C": (0.1,)}
    mine = fit_grid(store, PLANTED[:1], "resid_post", estimator=registered, **options)
    ridge = fit_grid(store, PLANTED[:1], "resid_post", estimator="ridge", **options)
    np.testing.assert_array_equal(mine.weights, ridge.weights)
    assert mine.provenance["estimator"] == registered
    assert mine.provenance["method"].startswith("ridge, again")
    assert set(probes.random_features(mine, store)["concept"]) == set(PLANTED[:1])  # refitted by name


def test_a_scikit_learn_classifier_is_fitted_to_standardized_training_rows(store: MemoryStore) -> None:
    classifier = LogisticRegression(C=0.01, class_weight="balanced", tol=1e-10, max_iter=10_000)
    options = {"control": 0, "folds": 2, "resamples": 2}
    grid = fit_grid(store, PLANTED[:1], "decoder.L1.resid_post", estimator=classifier, **options)
    assert grid.layers == (1,)
    assert np.isnan(grid.gap).all()
    assert np.isnan(grid.C).all()
    ours = fit_grid(store, PLANTED[:1], "decoder.L1.resid_post", C=(0.01,), **options)
    # The optimum is the same; margins of a scikit-learn classifier are then scaled to log-odds by a positive slope.
    slope = np.linalg.norm(grid.weights) / np.linalg.norm(ours.weights)
    np.testing.assert_allclose(grid.weights, slope * ours.weights, rtol=1e-3, atol=1e-6)
    with pytest.raises(ProbeError, match=r"unknown estimator 'LogisticRegression.*choose from"):
        probes.random_features(grid, store)


def test_estimators_that_cannot_be_used_are_refused(store: MemoryStore) -> None:
    with pytest.raises(ProbeError, match=r"unknown estimator 'logisti'; choose from .*did you mean logistic"):
        fit_grid(store, PLANTED, estimator="logisti")
    with pytest.raises(ProbeError, match=r"neither a probes\.Estimator nor a scikit-learn estimator"):
        fit_grid(store, PLANTED, estimator=3)  # pyright: ignore[reportArgumentType]
    neighbors = fit_grid(
        store, PLANTED[:1], "decoder.L0.resid_post", estimator=KNeighborsClassifier(), control=0, folds=2
    )
    assert np.isfinite(neighbors.balanced_accuracy).all()  # margins are log-odds of its probabilities
    with pytest.raises(ConfigError, match="the estimator 'three' is invalid"):
        probes.estimators.register("three", 3)  # pyright: ignore[reportArgumentType]
    fitted = fit_grid(store, PLANTED[:1], "decoder.L0.resid_post", estimator=LinearSVC(C=0.01), control=0, folds=2)
    assert fitted.provenance["estimator"] == "LinearSVC(C=0.01)"


def test_examples_without_a_label_are_left_out_and_counted(store: MemoryStore) -> None:
    table = store.frame()
    concept = PLANTED[0]
    table.loc[table.index[:30], concept] = np.nan
    open_ended = MemoryStore(table, store.values)
    options = {"control": 0, "folds": 2, "resamples": 2}
    every = fit_grid(open_ended, site="decoder.L0.resid_post", **options)  # all concepts that can be fitted
    assert set(every.concepts) == set(PLANTED)
    k = every.concepts.index(concept)
    undefined = table[concept].isna().sum()
    assert every.n_undefined[k] == undefined
    assert every.n_train[k] + every.n_test[k] == len(table) - undefined


def test_sites_are_written_as_everywhere(store: MemoryStore) -> None:
    options = {"control": 0, "folds": 2, "resamples": 2}
    layer = fit_grid(store, PLANTED[:1], "decoder.L2.resid_post", **options)
    every = fit_grid(store, PLANTED[:1], "decoder.resid_post", **options)
    np.testing.assert_array_equal(layer.weights[:, 0], every.weights[:, 2])
    with pytest.raises(SiteError, match="choose from layers 0, 1, 2"):
        fit_grid(store, PLANTED[:1], "decoder.L7.resid_post")
    with pytest.raises(SiteError, match="unknown site 'resid_pots'"):
        fit_grid(store, PLANTED[:1], "resid_pots")
