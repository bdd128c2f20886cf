"""Numbers and classes of users as labels: ridge and R2 against scikit-learn, splits by group, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from activation_store import MemorySource
from groundscope.core.errors import ProbeError
from probes import ProbeGrid, fit_grid, multiclass, permutation_test, plan_grids, transfer

C = (0.01, 0.1, 1.0)
OPTIONS: dict[str, Any] = {"C": C, "folds": 3, "resamples": 200}


@pytest.fixture(scope="module")
def store() -> MemorySource:
    """240 examples of 120 images; layer 1 encodes a number, a free yes-no concept and three classes, layer 0 nothing."""
    rng = np.random.default_rng(0)
    group = np.arange(240) // 2
    size = rng.normal(3.0, 2.0, 120)[group]
    hard, place = rng.integers(0, 2, 120)[group], rng.integers(0, 3, 120)[group]
    x = rng.normal(size=(240, 2, 12))
    x[:, 1, 0] += size
    x[:, 1, 1] += 3 * hard
    x[:, 1, 2:5] += 4 * np.eye(3)[place]
    table = {
        "id": [f"e{i}" for i in range(240)], "group": group, "question": ["?"] * 240, "margin": rng.normal(size=240),
        "size": np.where(np.arange(240) % 10 == 0, np.nan, size), "hard": hard.astype(bool),
        **{f"place:{name}": place == k for k, name in enumerate(("room", "street", "wood"))},
    }  # fmt: skip
    return MemorySource({"resid_post": x}, table)


@pytest.fixture(scope="module")
def grid(store: MemorySource) -> ProbeGrid:
    return fit_grid(store, ["size", "hard", "place"], "resid_post", **OPTIONS)


def split(store: MemorySource, grid: ProbeGrid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features of layer 1, the numbers, and which rows are held out, all with a label."""
    y = store.frame()["size"].to_numpy()
    used, out = ~np.isnan(y), np.isin(store.frame()["id"].to_numpy(), grid.held_out)
    return store.read("decoder.L1.resid_post", "last")[used].astype(float), y[used], out[used]


def test_numbers_equal_ridge_of_scikit_learn(store: MemorySource, grid: ProbeGrid) -> None:
    x, y, out = split(store, grid)
    k = grid.concepts.index("size")
    chosen = float(grid.C[k, 1, 0])
    scaler = StandardScaler().fit(x[~out])
    oracle = Ridge(alpha=1 / chosen, solver="cholesky").fit(scaler.transform(x[~out]), y[~out])
    predicted = oracle.predict(scaler.transform(x[out]))
    np.testing.assert_allclose(grid.r2[k, 1, 0], r2_score(y[out], predicted), rtol=1e-10)
    np.testing.assert_allclose(grid.weights[k, 1, 0], oracle.coef_ / scaler.scale_, rtol=1e-10)
    np.testing.assert_allclose(grid.decision("size", 1, None, x[out]), predicted, rtol=1e-10)
    # C has the smallest squared error over the folds, which are those of all concepts.
    assert chosen in C
    assert grid.r2[k, 1, 0] > 0.7 > 0.2 > grid.r2[k, 0, 0]
    assert grid.r2_low[k, 1, 0] < grid.r2[k, 1, 0] < grid.r2_high[k, 1, 0]
    assert grid.control[k, 1, 0] < 0.1
    assert grid.best("size").layer == 1
    assert grid.array("size")[1] == grid.r2[k, 1, 0]
    assert np.isnan(grid.balanced_accuracy[k]).all()
    assert grid.n_undefined[k] == 24


def test_c_is_selected_by_the_squared_error_over_folds() -> None:
    """Against a naive loop over the same folds, found again from the rows of each group."""
    from probes.protocol.splits import grouped_folds, grouped_split, strata

    rng = np.random.default_rng(1)
    x, groups = rng.normal(size=(90, 1, 20)), np.arange(90)
    y = x[:, 0, 0] + rng.normal(size=90)
    store = MemorySource({"resid_post": x}, {"id": range(90), "group": groups, "size": y})
    grid = fit_grid(store, ["size"], "resid_post", C=(1e-3, 1e-2, 1e-1), folds=3, control=0, resamples=2)
    names, features = groups.astype(str), x[:, 0].astype(np.float32).astype(float)
    classes = strata(y[:, None])
    out = grouped_split(names, classes, 0.3, 0)
    fold = grouped_folds(names[~out], classes[~out], 3, 0)
    training, targets = features[~out], y[~out]
    errors = []
    for c in (1e-3, 1e-2, 1e-1):
        predicted = np.empty(len(targets))
        for f in range(3):
            model = make_pipeline(StandardScaler(), Ridge(alpha=1 / c)).fit(training[fold != f], targets[fold != f])
            predicted[fold == f] = model.predict(training[fold == f])
        errors.append(((predicted - targets) ** 2).sum())
    assert grid.C[0, 0, 0] == (1e-3, 1e-2, 1e-1)[int(np.argmin(errors))]
    expected = 1 - min(errors) / ((targets - targets.mean()) ** 2).sum()
    np.testing.assert_allclose(grid.validation[0, 0, 0], expected, rtol=1e-9)


def test_groups_are_not_divided(store: MemorySource, grid: ProbeGrid) -> None:
    assert not set(grid.held_out_groups) & set(grid.train_groups)
    y = store.frame().set_index("id")["size"].loc[list(grid.held_out)].dropna()
    assert 0.3 < (y > store.frame()["size"].median()).mean() < 0.7  # balanced above and below the median


def test_free_concepts_and_classes_are_probed_by_name(store: MemorySource, grid: ProbeGrid) -> None:
    assert grid.concepts == ("size", "hard", "place:room", "place:street", "place:wood")
    assert grid.best("hard").balanced_accuracy > 0.8
    assert set(grid.frame()["level"]) == {""}
    assert grid.numbers == ("size",)
    one_against_others = multiclass(grid, "place")
    softmax = multiclass(grid, "place", how="softmax", store=store)
    assert (one_against_others["balanced_accuracy"][1], softmax["balanced_accuracy"][1]) > (0.8, 0.8)
    assert softmax["chance"][1] == pytest.approx(1 / 3)
    assert {c for p in plan_grids(store) for c in p.concepts} == set(
        grid.concepts
    )  # not the margin, a field of examples
    assert set(fit_grid(store, None, "decoder.L1.resid_post", **OPTIONS).concepts) == set(grid.concepts)


def test_the_softmax_probe_of_a_class_column_equals_scikit_learn(store: MemorySource, grid: ProbeGrid) -> None:
    softmax = multiclass(grid, "place", how="softmax", store=store).set_index("layer").loc[1]
    frame, x = store.frame(), store.read("decoder.L1.resid_post", "last").astype(float)
    y = frame[["place:room", "place:street", "place:wood"]].to_numpy().argmax(axis=1)
    out = frame["id"].isin(grid.held_out).to_numpy()
    model = LogisticRegression(C=float(softmax["C"]), class_weight="balanced", tol=1e-10, max_iter=10_000)
    oracle = make_pipeline(StandardScaler(), model).fit(x[~out], y[~out])
    recalls = [np.mean(oracle.predict(x[out])[y[out] == k] == k) for k in range(3)]
    assert softmax["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)


def test_a_grid_with_numbers_is_saved_and_read(grid: ProbeGrid, store: MemorySource, tmp_path: Path) -> None:
    loaded = ProbeGrid.load(grid.save(tmp_path / "numbers"))
    for name in ("r2", "r2_low", "r2_high", "held_out_labels"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(grid, name))
    assert loaded.numbers == ("size",)
    assert grid.direction("size", 1).statistics["r2"] == grid.r2[0, 1, 0]
    plain = fit_grid(store, ["hard"], "resid_post", **OPTIONS)
    assert '"version": 3' in (plain.save(tmp_path / "plain") / "grid.json").read_text()  # earlier versions read it
    assert ProbeGrid.load(tmp_path / "plain").numbers == ()


def test_an_estimator_that_is_not_linear_has_scores_but_no_direction(store: MemorySource) -> None:
    options: dict[str, Any] = {"control": 0, "folds": 2, "resamples": 2}
    grid = fit_grid(store, ["hard"], "decoder.L1.resid_post", estimator=SVC(C=1.0), **options)
    frame = store.frame()
    out = frame["id"].isin(grid.held_out).to_numpy()
    x, y = store.read("decoder.L1.resid_post", "last").astype(float), frame["hard"].to_numpy()
    oracle = make_pipeline(StandardScaler(), SVC(C=1.0)).fit(x[~out], y[~out])
    assert grid.accuracy[0, 0, 0] == oracle.score(x[out], y[out])
    piped = fit_grid(
        store, ["hard"], "decoder.L1.resid_post", estimator=make_pipeline(StandardScaler(), SVC(C=1.0)), **options
    )
    assert piped.accuracy[0, 0, 0] == grid.accuracy[0, 0, 0]
    assert np.isnan(grid.weights).all()
    for use in (lambda: grid.direction("hard", 1), lambda: grid.decision("hard", 1, None, x)):
        with pytest.raises(
            ProbeError, match=r"the probes of this grid \(SVC\(\)\) are not linear, so they have no weights"
        ):
            use()


def test_a_regressor_predicts_numbers(store: MemorySource) -> None:
    lasso = fit_grid(store, ["size"], "decoder.L1.resid_post", estimator=Lasso(0.1), control=0, resamples=2)
    x, y, out = split(store, lasso)
    oracle = make_pipeline(StandardScaler(), Lasso(0.1)).fit(x[~out], y[~out])
    np.testing.assert_allclose(lasso.r2[0, 0, 0], oracle.score(x[out], y[out]), rtol=1e-6)


def test_what_does_not_fit_is_refused(store: MemorySource, grid: ProbeGrid) -> None:
    with pytest.raises(ProbeError, match=r"SVC\(\) is a classifier, but 'size' holds numbers; give a linear regressor"):
        fit_grid(store, ["size"], estimator=SVC(), site="resid_post")
    with pytest.raises(ProbeError, match=r"Ridge\(\) is a regressor, but 'hard' holds yes or no; give a classifier"):
        fit_grid(store, ["hard"], estimator=Ridge(), site="resid_post")
    with pytest.raises(ProbeError, match="the permutation test scores classes, but 'size' holds numbers"):
        permutation_test(grid, store)
    with pytest.raises(ProbeError, match="transfer scores classes, but 'size' holds numbers"):
        transfer(grid, {"x": store})
    with pytest.raises(ProbeError, match="no classes of 'plac' in this grid; choose from place; did you mean place"):
        multiclass(grid, "plac")
    with pytest.raises(ProbeError, match="'margin' not in store; choose from size, hard"):
        fit_grid(store, ["margin"], "resid_post")
    constant = MemorySource(
        {"resid_post": np.zeros((40, 1, 2))}, {"id": range(40), "group": range(40), "x": [2.5] * 40}
    )
    with pytest.raises(ProbeError, match=r"'x' is 2\.5 on all rows where it is defined; numbers must differ"):
        fit_grid(constant, ["x"], "resid_post")
