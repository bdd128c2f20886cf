"""Permutation tests: p-values that hold on noise, find what is planted, and equal a naive float64 loop."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from groundscope.core.errors import ProbeError
from groundscope.core.statistics import wilson
from probes import fit_grid, permutation_test
from probes.analysis.permutation import benjamini_hochberg, benjamini_yekutieli
from probes.protocol.controls import control_labels, shuffle_within
from probes.solvers.ridge_many_labels import Targets, ridge_scores
from tests.toys.memory_store import PLANTED, MemoryStore, make_store

PENALTIES = np.array([1e-4, 1e-2, 1.0], dtype=np.float32)


def naive(x: np.ndarray, t: np.ndarray, fold: np.ndarray) -> float:
    """The documented procedure for one labelling, in float64 with scikit-learn."""
    train = fold >= 0
    losses = []
    for C in PENALTIES.astype(float):
        loss = 0.0
        for f in range(fold.max() + 1):
            inner, outer = train & (fold != f), fold == f
            scaler = StandardScaler().fit(x[inner])
            ridge = Ridge(alpha=1 / C).fit(scaler.transform(x[inner]), t[inner])
            loss += ((ridge.predict(scaler.transform(x[outer])) - t[outer]) ** 2).sum()
        losses.append(loss)
    C = PENALTIES.astype(float)[int(np.argmin(losses))]
    scaler = StandardScaler().fit(x[train])
    ridge = Ridge(alpha=1 / C).fit(scaler.transform(x[train]), t[train])
    projected = scaler.transform(x) @ ridge.coef_
    middle = np.mean([projected[train & (t == v)].mean() for v in (-1, 1)])
    positive = projected[~train] > middle
    return float(np.mean([(positive == (v == 1))[t[~train] == v].mean() for v in (-1, 1)]))


@pytest.mark.parametrize("width", [9, 100, 300])
def test_scores_equal_a_naive_loop(width: int) -> None:
    """Narrow and wide features take other ways; 100 are fewer than the rows and more than those of the other folds."""
    rng = np.random.default_rng(width)
    n = 160
    x = rng.normal(size=(n, width)) * rng.uniform(0.1, 10, width) + rng.normal(size=width) * 5
    x[:, 3] = 2.0  # constant
    fold = np.r_[np.arange(120) % 4, -np.ones(40, dtype=int)][rng.permutation(n)]
    base = np.where(x[:, 0] - x[:, 0].mean() + rng.normal(size=n) * x[:, 0].std() > 0, 1.0, -1.0)
    columns = np.stack([base, *(rng.permutation(base) for _ in range(30))], axis=1)
    got = ridge_scores(x.astype(np.float32), Targets.of(columns.astype(np.float32), fold), PENALTIES)
    want = [naive(x.astype(np.float32).astype(float), c, fold) for c in columns.T]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_planted_concept_is_significant_only_at_its_head() -> None:
    store = make_store()
    grid = fit_grid(store, PLANTED, control=0, C=(1e-3, 1e-1))
    significance = permutation_test(grid, store, permutations=500)
    frame = significance.frame()
    assert len(frame) == 36
    for concept, layer, head in (("object:apple", 1, 2), ("attribute:green", 2, 0)):
        part = frame[frame["concept"] == concept]
        there = (part["layer"] == layer) & (part["head"] == head)
        row = part[there].iloc[0]
        assert row["p"] == row["p_concept"] == row["p_family"] == pytest.approx(1 / 501)
        assert row["q_bh"] < 0.05
        assert part[~there]["p_family"].min() > 0.05
    assert (frame["p_family"] >= frame["p_concept"]).all()
    assert (frame["p_concept"] >= frame["p"]).all()
    assert (frame["q_by"] >= frame["q_bh"]).all()
    np.testing.assert_allclose(significance.q_bh.ravel(), false_discovery_control(significance.p.ravel(), method="bh"))
    np.testing.assert_allclose(significance.q_by.ravel(), false_discovery_control(significance.p.ravel(), method="by"))
    assert significance.maxima.shape == (3, 500)


def test_parts_that_fit_into_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(n_groups=60)
    grid = fit_grid(store, ["object:apple"], control=0, C=(1e-2,), folds=3)
    whole = permutation_test(grid, store, permutations=25)
    monkeypatch.setattr("probes.analysis.permutation.LABEL_BYTES", 4 * 240 * 7)
    parts = permutation_test(grid, store, permutations=25)
    np.testing.assert_array_equal(whole.maxima, parts.maxima)
    np.testing.assert_array_equal(whole.p, parts.p)


def noise_store(seed: int, groups: int = 40, size: int = 3, heads: int = 3, width: int = 4) -> MemoryStore:
    """Pure noise in which rows of a group are alike, in features and in labels."""
    rng = np.random.default_rng([seed, 77])
    group = np.repeat(np.arange(groups), size)
    z = rng.normal(size=(groups, 2, heads * width))[group] + rng.normal(size=(groups * size, 2, heads * width))
    table = pd.DataFrame({"id": [f"q{i}" for i in range(len(group))], "group": [f"s{g}" for g in group]})
    for name in ("object:a", "object:b"):
        table[name] = rng.permutation(np.arange(groups) % 2)[group].astype(np.float32)
    return MemoryStore(table, {("decoder", "z", "last"): z}, n_heads=heads)


def test_family_wise_false_positives_are_at_their_rate_on_pure_noise() -> None:
    """200 stores, 12 cells each: the best cell passes at 5 % in about 5 % of them, and rows taken singly would not do."""
    stores, wrong, naive_wrong = 200, 0, 0
    for seed in range(stores):
        store = noise_store(seed)
        grid = fit_grid(
            store,
            ["object:a", "object:b"],
            control=0,
            C=(1e-2,),
            folds=2,
            resamples=1,
            estimator="mean_difference",
            seed=seed,
        )
        significance = permutation_test(grid, store, permutations=59, seed=seed)
        wrong += int(significance.p_family.min() <= 0.05)
        naive_wrong += int(significance.p.min() <= 0.05)
    low, high = wilson(wrong, stores, confidence=0.99)
    assert low <= 0.05 <= high, wrong
    assert naive_wrong > 0.2 * stores  # the same cells without the correction for how many were looked at


def test_noise_looks_significant_if_rows_of_a_group_are_permuted_separately() -> None:
    """With images split across parts, noise looks significant: rows of a group know each other."""
    wrong = 0
    for seed in range(20):
        store = noise_store(seed, groups=40, size=4)
        torn = MemoryStore(store.table.assign(group=store.table["id"]), store.values, n_heads=3)
        grid = fit_grid(torn, ["object:a"], control=0, C=(1e-2,), folds=2, resamples=1, estimator="ridge")
        wrong += int(permutation_test(grid, torn, permutations=59).p_family.min() <= 0.05)
    assert wrong >= 5


def test_permuting_within_groups_keeps_the_label_rate_of_each_group() -> None:
    """The label's rate differs between images and the features tell the image, not the label: only blocks is fooled."""
    rng = np.random.default_rng(0)
    groups, size = 120, 5
    group = np.repeat(np.arange(groups), size)
    rate = rng.uniform(size=groups)
    table = pd.DataFrame({"id": [f"q{i}" for i in range(len(group))], "group": [f"s{g}" for g in group]})
    table["object:a"] = (rng.random(len(group)) < 0.15 + 0.7 * (rate[group] > 0.5)).astype(np.float32)
    x = np.column_stack([rate[group], rng.normal(size=(len(group), 2))])[:, None]
    store = MemoryStore(table, {("decoder", "resid_post", "last"): x})
    grid = fit_grid(store, ["object:a"], "resid_post", control=0, C=(1.0,))
    assert permutation_test(grid, store, permutations=99).p_family.min() == pytest.approx(0.01)
    assert permutation_test(grid, store, permutations=99, scheme="within").p_family.min() > 0.05
    labels = np.array([1.0, 0, 0, 1, 1, 0])
    names = np.array([0, 0, 0, 1, 1, 1])
    shuffled = shuffle_within(labels, names, np.zeros(6), 3)
    assert [shuffled[names == g].sum() for g in (0, 1)] == [1, 2]


def test_bad_input_is_refused() -> None:
    store = make_store(n_groups=60)
    grid = fit_grid(store, ["object:apple"], control=0, C=(1e-2,), folds=3)
    for options, message in (
        ({"permutations": 0}, "permutations=0"),
        ({"scheme": "rows"}, "unknown scheme 'rows'; choose from blocks, within"),
        ({"scheme": "within"}, "'object:apple' .* constant within every group"),
        ({"rows": np.arange(240) < 200}, "not split as the grid's were"),
    ):
        with pytest.raises(ProbeError, match=message):
            permutation_test(grid, store, **{"permutations": 5, **options})
    other = make_store(seed=1, n_groups=60)
    other.digest = "e" * 64
    with pytest.raises(ProbeError, match="the grid was fitted on store dddddd"):
        permutation_test(grid, other, permutations=5)


def test_adjusted_p_values_of_a_known_case() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.005]])
    np.testing.assert_allclose(benjamini_hochberg(p), [[0.02, 0.04], [0.04, 0.02]])
    np.testing.assert_allclose(benjamini_yekutieli(p), benjamini_hochberg(p) * (1 + 1 / 2 + 1 / 3 + 1 / 4))


def test_a_control_task_labels_types() -> None:
    types = np.array(list("abcabcdd"))
    labels = control_labels(types, 0.5, 0)
    for name in "abcd":
        assert len(set(labels[types == name])) == 1
    assert set(labels) == {0.0, 1.0}
    assert control_labels(types, 0.0, 1).sum() > 0
