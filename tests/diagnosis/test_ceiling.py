"""Ceilings of behavior: against naive loops, a planted leak, and rates of false violations without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.optimize import linprog, minimize
from sklearn.linear_model import LogisticRegression, QuantileRegressor
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from behavior import Answer, BehaviorResult, Cost
from diagnosis import ceilings_of_readings, regress_correctness, representation_ceiling
from diagnosis.ceiling import cross_fitted_margins, folds_of
from diagnosis.ceiling_regression import auc_by_ranks, quantile_coefficients
from groundscope.core.errors import ConfigError, DataError, StoreError


def toy(
    rng: np.random.Generator, n: int, layers: tuple[float, ...], behavior: float
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Margins that are positive with given rates, right answers, and images of two rows each."""
    margins = np.where(rng.random((len(layers), n)) < np.array(layers)[:, None], 1.0, -1.0)
    return margins, rng.random(n) < behavior, [f"image {i // 2}" for i in range(n)]


def test_differences_and_draws_are_those_of_loops() -> None:
    rng = np.random.default_rng(0)
    margins, correct, groups = toy(rng, 60, (0.6, 0.7, 0.65), 0.7)
    cell = ceilings_of_readings(margins, correct, groups, ["a"] * 60, ["b"] * 60, folds=3, resamples=100, seed=4).cells[
        0
    ]
    names = sorted(set(groups))
    fold = dict(zip(names, folds_of(np.array(names), 3, 4), strict=True))

    def difference(weight: dict[str, float]) -> float:
        total = sum(weight[g] for g in groups)
        reads = 0.0
        for f in range(3):
            on_others = [sum(weight[g] for i, g in enumerate(groups) if fold[g] != f and row[i] > 0) for row in margins]
            best = margins[on_others.index(max(on_others))]
            reads += sum(weight[g] for i, g in enumerate(groups) if fold[g] == f and best[i] > 0)
        return (sum(weight[g] for i, g in enumerate(groups) if correct[i]) - reads) / total

    assert cell.difference == pytest.approx(difference(dict.fromkeys(names, 1.0)))
    assert cell.behavior == pytest.approx(correct.mean())
    assert cell.behavior - cell.ceiling == pytest.approx(cell.difference)
    draws = np.random.default_rng(4).multinomial(len(names), np.full(len(names), 1 / len(names)), size=100)
    values = [difference(dict(zip(names, map(float, w), strict=True))) for w in draws]
    assert (cell.low, cell.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert cell.p == pytest.approx((1 + sum(v <= 1e-12 for v in values)) / 101)


def test_a_leak_violates_the_ceiling_of_its_cell_only() -> None:
    """In one cell the answers come from elsewhere: they are right in 95 %, and no layer reads more than 75 %."""
    rng = np.random.default_rng(1)
    parts = [toy(rng, 200, (0.55, 0.75, 0.65), 0.95 if k == 2 else 0.7) for k in range(5)]
    margins = np.concatenate([p[0] for p in parts], axis=1)
    correct = np.concatenate([p[1] for p in parts])
    groups = [f"{k} {g}" for k, p in enumerate(parts) for g in p[2]]
    concepts = [f"concept {k}" for k in range(5) for _ in range(200)]
    result = ceilings_of_readings(margins, correct, groups, concepts, ["all"] * 1000, layers=("L0", "L1", "L2"))
    assert [cell.concept for cell in result.cells if cell.violated] == ["concept 2"]
    leak = result.cells[2]
    assert leak.low > 0.1
    assert leak.layers.count("L1") >= 4
    assert leak.headroom == pytest.approx(leak.ceiling - leak.behavior)
    assert all(cell.q >= cell.p for cell in result.cells)
    layer = [int(leak.layers[f][1]) for f in folds_of(np.array(groups), 5, 0)[400:600]]
    np.testing.assert_array_equal(result.margins[400:600], margins[layer, np.arange(400, 600)])
    legend = result.plot().get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 5
    plt.close("all")
    assert result.frame()["violated"].sum() == 1


def test_false_violations_are_rare_where_behavior_is_as_accurate_as_the_best_layer() -> None:
    """150 sets of 4 cells at nominal 2.5 %: the bootstrap of few images makes it somewhat more, the repeated choice less."""
    rng = np.random.default_rng(2)
    single = adjusted = 0
    for seed in range(150):
        margins, correct, groups = toy(rng, 800, (0.8, 0.7, 0.75, 0.5), 0.8)
        cells = [f"cell {i // 200}" for i in range(800)]
        result = ceilings_of_readings(margins, correct, groups, cells, ["all"] * 800, resamples=300, seed=seed)
        single += sum(cell.low > 0 for cell in result.cells)
        adjusted += sum(cell.violated for cell in result.cells)
    assert single / 600 <= 0.07
    assert adjusted <= single / 2


def test_cross_fitted_margins_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    for k in (2, 3):
        x = rng.normal(size=(90, 6))
        truth = np.array([f"c{i}" for i in (x[:, 0] > 0).astype(int) + (k == 3) * (x[:, 1] > 0.5)])
        fold = folds_of(np.array([f"g{i // 2}" for i in range(90)]), 3, 0)
        expected = np.empty(90)
        for f in range(3):
            fit = make_pipeline(
                StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10, max_iter=5000)
            )
            fit.fit(x[fold != f], truth[fold != f])
            scores = np.log(fit.predict_proba(x[fold == f]))
            for i, row in zip(np.flatnonzero(fold == f), scores, strict=True):
                own = list(fit.classes_).index(truth[i])
                expected[i] = row[own] - max(v for j, v in enumerate(row) if j != own)
        np.testing.assert_allclose(cross_fitted_margins(x, truth, fold), expected, atol=5e-4)


def fake_store(x: np.ndarray, truth: list[str], model: list[str]) -> Any:
    n = len(truth)
    columns = {
        "id": [f"q{i}" for i in range(n)], "group": [f"g{i // 2}" for i in range(n)], "level": ["object"] * n,
        "kind": ["existence"] * n, "split": ["neutral"] * n, "answer": truth, "model_answer": model,
    }  # fmt: skip
    return SimpleNamespace(columns=columns, path=Path("store"), arrays=(), read=lambda site, tokens: x)


def test_the_ceiling_of_a_store_and_of_other_answers() -> None:
    rng = np.random.default_rng(5)
    truth = [("yes", "no")[i % 2] for i in range(80)]
    x = rng.normal(size=(80, 4))
    store = fake_store(x, truth, truth)  # always right, though nothing is readable
    sites = [("decoder.L0.resid_post", "last")]
    cell = representation_ceiling(store, sites=sites, folds=4, resamples=500, progress=False).cells[0]
    assert (cell.behavior, cell.violated, cell.n, cell.groups) == (1.0, True, 80, 40)
    readable = fake_store(np.column_stack([x, [5.0 * (t == "yes") for t in truth]]), truth, truth)
    assert not representation_ceiling(readable, sites=sites, folds=4, resamples=500, progress=False).cells[0].violated
    about = ("neutral", "object", "existence", "Is it?")
    said = [
        Answer(f"q{i}", f"g{i // 2}", *about, t, ("yes", "no"), given="no", correct=t == "no")
        for i, t in enumerate(truth)
    ]
    answers = BehaviorResult(tuple(said), Cost(1.0, 1, 80), {})
    assert representation_ceiling(store, answers, sites=sites, folds=4, progress=False).cells[0].behavior == 0.5
    with pytest.raises(StoreError, match="example 'q79' is missing in the answers"):
        representation_ceiling(store, BehaviorResult(tuple(said[:-1]), Cost(1.0, 1, 79), {}), sites=sites)
    with pytest.raises(StoreError, match=r"lacks decoder\.resid_post at last"):
        representation_ceiling(store)
    with pytest.raises(DataError, match="all 80 rows of 'object existence' have the answer 'yes'"):
        representation_ceiling(fake_store(x, ["yes"] * 80, truth), sites=sites)
    with pytest.raises(DataError, match="has 3 images, and needs 2 for each"):
        representation_ceiling(fake_store(x[:6], truth[:6], truth[:6]), sites=sites)
    with pytest.raises(ConfigError, match="unknown concept 'levels'"):
        representation_ceiling(store, concept="levels")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"groups": ["a"]}, DataError, "groups has 1"),
        ({"margins": np.ones(4)}, DataError, r"shape \(4,\)"),
        ({"resamples": 10}, ConfigError, "at least 100 draws"),
        ({"folds": 9}, DataError, "folds=9 with 4 images"),
    ],
)
def test_wrong_readings_are_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"margins": np.ones((2, 4)), "correct": np.ones(4, bool), "groups": list("abcd")}
    arguments |= {"concepts": ["x"] * 4, "conditions": ["y"] * 4} | change
    with pytest.raises(error, match=match):
        ceilings_of_readings(**arguments)


def test_regressions_are_those_of_other_solvers() -> None:
    rng = np.random.default_rng(6)
    n = 240
    probe, size = rng.normal(size=(2, n))
    split = np.where(rng.random(n) < 0.5, "neutral", "conflict")
    margin = 0.8 * probe + 0.3 * size + 0.5 * (split == "neutral") + rng.normal(size=n)
    correct = margin > 0
    groups = [f"g{i // 2}" for i in range(n)]
    result = regress_correctness(
        correct,
        {"probe": probe},
        groups,
        controls={"size": size, "split": split},
        margins=margin,
        resamples=40,
        progress=False,
    )
    x = np.column_stack([probe, size, split == "neutral"]).astype(float)
    x = (x - x.mean(0)) / x.std(0)
    design = np.column_stack([np.ones(n), x])

    def loss(b: np.ndarray) -> float:
        return float(np.logaddexp(0, -np.where(correct, 1, -1) * (design @ b)).sum() + (b[1:] ** 2).sum() / 200)

    assert result.odds_ratios["probe"].value == pytest.approx(np.exp(minimize(loss, np.zeros(4)).x[1]), rel=1e-3)
    # Quantile regression as a linear program: minimize .9 u + .1 v with margin = design b + u - v.
    cost = np.concatenate([np.zeros(8), np.full(n, 0.9), np.full(n, 0.1)])
    equal = np.column_stack([design, -design, np.eye(n), -np.eye(n)])
    solved = linprog(cost, A_eq=equal, b_eq=margin, bounds=(0, None))
    assert result.slopes["probe"].value == pytest.approx(solved.x[1] - solved.x[5], abs=1e-5)
    assert result.odds_ratios["probe"].low > 1
    assert result.slopes["probe"].low > 0
    assert result.difference.value == pytest.approx(result.auc - result.auc_controls)
    assert result.difference.low > 0
    assert "odds ratios: probe" in str(result)
    # Draws of the bootstrap start from the solution of all rows, and reach that of a linear program.
    rows = rng.integers(0, n, n)
    whole, drawn = (
        QuantileRegressor(quantile=0.9, alpha=0.0, solver="highs").fit(x[at], margin[at]) for at in (np.arange(n), rows)
    )
    start, expected = (np.append(fit.coef_, fit.intercept_) for fit in (whole, drawn))
    assert np.abs(start - expected).max() > 0.02
    reached = quantile_coefficients(x[rows], margin[rows], 0.9, start)

    def check_loss(b: np.ndarray) -> float:
        residual = margin[rows] - np.column_stack([x[rows], np.ones(n)]) @ b
        return float(np.maximum(0.9 * residual, -0.1 * residual).mean())

    assert check_loss(reached) <= check_loss(expected) * (1 + 1e-3)
    assert auc_by_ranks(correct, np.round(margin, 1)) == pytest.approx(roc_auc_score(correct, np.round(margin, 1)))


def test_a_score_that_only_repeats_a_control_adds_nothing_and_the_layer_is_chosen_on_other_images() -> None:
    rng = np.random.default_rng(7)
    n = 300
    prior = rng.normal(size=n)
    correct = rng.random(n) < 1 / (1 + np.exp(-1.5 * prior))
    groups = [f"g{i // 2}" for i in range(n)]
    echo = np.stack([rng.normal(size=n), prior + rng.normal(size=n), rng.normal(size=n)])
    result = regress_correctness(
        correct, {"echo": echo}, groups, controls={"prior": prior}, resamples=60, progress=False
    )
    assert result.layers["echo"] == (1,) * 5
    assert result.odds_ratios["echo"].low < 1 < result.odds_ratios["echo"].high
    assert result.difference.low <= 0.01
    alone = regress_correctness(correct, {"echo": echo}, groups, resamples=60, progress=False)
    assert alone.odds_ratios["echo"].low > 1
    assert alone.auc_controls == 0.5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"correct": np.ones(40, bool)}, "all answers are right, or all wrong"),
        ({"scores": {}}, "scores is empty"),
        ({"scores": {"a": np.ones(39)}}, "score 'a' has 39"),
        ({"scores": {"a": np.full(40, np.nan)}}, "not finite"),
        ({"groups": ["g"] * 40}, "folds=5 with 1 image"),
        ({"controls": {"k": ["x"] * 3}}, "control 'k' has the shape"),
        ({"controls": {"k": [f"v{i}" for i in range(40)]}}, "use fewer controls"),
    ],
)
def test_wrong_regressions_are_refused(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"correct": np.arange(40) % 2 == 0, "scores": {"a": np.arange(40.0)}}
    arguments |= {"groups": [f"g{i}" for i in range(40)]} | change
    with pytest.raises(DataError, match=match):
        regress_correctness(**arguments)
