"""The float32 solver: its solution is optimal, and the float64 duality gap is a true bound."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from groundscope.core.errors import ProbeError
from probes.solvers import logistic_float32
from probes.solvers.duality_gap import certify
from probes.solvers.lbfgs import minimize
from probes.solvers.logistic_float32 import RowBlock, balanced_weights, fit_rows
from probes.solvers.logistic_reference import LinearFit, fit_logistic

PENALTIES = np.array([1e-4, 1e-2, 1.0, 100.0])


def oracle(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float, float]:
    """Margins, intercept and objective of scikit-learn at 1e-10, standardised, classes balanced."""
    z = StandardScaler().fit_transform(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it stalls above 1e-10 the comparison by objective still holds
        model = LogisticRegression(
            C=penalty, tol=1e-10, solver="newton-cholesky", max_iter=10_000, class_weight="balanced"
        ).fit(z, y)
    w, b = model.coef_[0], float(model.intercept_[0])
    margins = z @ w + b
    weights = np.where(y == 1, len(y) / (2 * y.sum()), len(y) / (2 * (len(y) - y.sum())))
    loss = np.logaddexp(0.0, -np.where(y == 1, 1.0, -1.0) * margins)
    return margins, b, float(0.5 * w @ w + penalty * np.sum(weights * loss))


def make(kind: str, n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.uniform(0.01, 100, d) + rng.normal(size=d) * 50
    score = (x[:, 0] - x[:, 0].mean()) / x[:, 0].std()
    noise = 0.0 if kind == "separable" else 1.0
    y = (score + noise * rng.normal(size=n) > 0).astype(float)
    if kind == "collinear" and d > 3:
        x[:, 1], x[:, 2] = 3 * x[:, 0] - 2, x[:, 0] + x[:, 3]
    elif kind == "unbalanced":
        y = np.zeros(n)
        y[np.argsort(score)[-3:]] = 1
    elif kind == "constant":
        x[:, d // 2], x[:, 0] = 0.1, 0.0
    elif kind == "heavy":
        x = x * np.exp(2 * rng.normal(size=(n, 1)))
    y[:2] = [0, 1]
    return x, y


@given(
    kind=st.sampled_from(["random", "separable", "collinear", "unbalanced", "constant", "heavy"]),
    n=st.integers(12, 90),
    d=st.integers(2, 150),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_agrees_with_scikit_learn_and_never_claims_more_than_it_has(kind: str, n: int, d: int, seed: int) -> None:
    """Narrow and wide, whatever the data: the objective is the truth's within the proven gap, which is small."""
    x, y = make(kind, n, d, seed)
    fit = fit_rows(RowBlock.of(x), y[None], PENALTIES[None], balanced_weights(y[None]))
    assert fit.gap.max() <= 1e-8
    for at, penalty in enumerate(PENALTIES):
        margins, _, value = oracle(x, y, penalty)
        assert fit.objective[at] * (1 - fit.gap[at]) <= value * (1 + 1e-9)
        assert fit.objective[at] <= value * (1 + 2e-8)
        # Strong convexity turns a small gap into near weights; margins are those times the rows.
        scale = max(1.0, float(np.abs(margins).max()))
        assert np.abs(fit.decision(x)[at] - margins).max() <= 2e-2 * scale


@pytest.mark.parametrize("d", [20, 400])
def test_a_batch_equals_its_problems_and_does_not_change_its_input(d: int) -> None:
    rng = np.random.default_rng(d)
    x = rng.normal(size=(150, d))
    labels = np.stack([(x[:, k] + rng.normal(size=150) > 0.3 * k).astype(float) for k in range(4)])
    before = x.copy(), labels.copy()
    penalties = np.broadcast_to(PENALTIES, (4, 4))
    batch = fit_rows(RowBlock.of(x), labels, penalties, balanced_weights(labels), tolerance=1e-10)
    for k in range(4):
        for c in range(4):
            alone = fit_rows(
                RowBlock.of(x), labels[k : k + 1], penalties[k : k + 1, c : c + 1], balanced_weights(labels[k : k + 1])
            )
            assert batch.objective[4 * k + c] == pytest.approx(alone.objective[0], rel=2e-8)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_the_certificate_bounds_the_true_gap_of_any_point() -> None:
    """Also far from the optimum, with an intercept that is off, and for weights of any size."""
    rng = np.random.default_rng(0)
    x, y = make("random", 80, 12, 1)
    z = StandardScaler().fit_transform(x)
    costs = balanced_weights(y[None]) * 0.3
    _, _, best = oracle(x, y, 0.3)
    for size in (0.0, 1e-3, 0.1, 1.0, 5.0):
        w = rng.normal(size=(6, 12)) * size
        b = rng.normal(size=6) * np.array([0, 0.01, 0.1, 0.3, 1, 3])
        arrays = (z, np.repeat(y[None], 6, 0), np.repeat(costs, 6, 0), w, b)
        value, gap = (t.numpy() for t in certify(*(torch.from_numpy(a) for a in arrays)))
        margins = w @ z.T + b[:, None]
        loss = np.logaddexp(0.0, -np.where(y == 1, 1.0, -1.0) * margins)
        np.testing.assert_allclose(value, 0.5 * (w**2).sum(1) + (costs * loss).sum(1), rtol=1e-12)
        assert (gap * value >= (value - best) * (1 - 1e-9)).all()
        assert (gap > 0).all()
        assert np.isfinite(gap[:3]).all() or size > 0.1  # an intercept far off proves nothing, a near one does


@pytest.mark.parametrize("lost", [(torch.float32,), (torch.float32, torch.float64)])
@pytest.mark.parametrize("d", [10, 130])
def test_fits_without_a_certificate_are_solved_again_in_float64(
    d: int, lost: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First from the float32 solution; if that fails as well, from zero with the reference solver."""
    x, y = make("random", 100, d, 2)
    block, weights = RowBlock.of(x), balanced_weights(y[None])
    good = fit_rows(block, y[None], PENALTIES[None], weights)
    real = logistic_float32.minimize

    def lame(*args, **kwargs) -> torch.Tensor:
        solution = real(*args, **kwargs)
        if solution.dtype in lost:
            solution[-1] = 0  # one solution is lost
        return solution

    def reference(*args, **kwargs) -> LinearFit:
        called.append(1)
        return fit_logistic(*args, **kwargs)

    called: list[int] = []
    monkeypatch.setattr(logistic_float32, "minimize", lame)
    monkeypatch.setattr(logistic_float32, "fit_logistic", reference)
    fallback = fit_rows(block, y[None], PENALTIES[None], weights)
    assert len(called) == len(lost) - 1
    assert fallback.gap.max() <= 1e-8
    np.testing.assert_allclose(fallback.objective, good.objective, rtol=2e-8)
    np.testing.assert_allclose(fallback.decision(x), good.decision(x), atol=1e-3)


def test_a_device_short_of_memory_gets_smaller_batches_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = make("random", 60, 10, 3)
    block, weights = RowBlock.of(x), balanced_weights(y[None])
    whole = fit_rows(block, y[None], PENALTIES[None], weights)
    real, sizes = logistic_float32.minimize, []

    def small(space, labels, *args, **options) -> torch.Tensor:
        sizes.append(len(labels))
        if len(labels) > most:
            raise torch.OutOfMemoryError
        return real(space, labels, *args, **options)

    monkeypatch.setattr(logistic_float32, "minimize", small)
    most = 1
    parts = fit_rows(block, y[None], PENALTIES[None], weights)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    np.testing.assert_allclose(parts.objective, whole.objective, rtol=2e-8)
    most = 0
    with pytest.raises(ProbeError, match=r"has no memory for a single probe on \(60, 10\) features"):
        fit_rows(block, y[None], PENALTIES[None], weights)


def test_a_device_that_cannot_hold_the_features_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_, **__) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(ProbeError, match=r"device 'cpu' has no memory for a single probe on \(60, 10\) features"):
        RowBlock.of(make("random", 60, 10, 3)[0])


@pytest.mark.parametrize("kind", ["separable", "unbalanced"])
def test_the_optimum_and_its_gap_do_not_depend_on_the_start(kind: str) -> None:
    """At what nearly the same rows gave, and at nonsense; on axes of other rows."""
    x, y = make(kind, 80, 12, 5)
    weights, rows = balanced_weights(y[None]), np.arange(80) != 7
    whole = RowBlock.of(x)
    near = fit_rows(RowBlock.of(x[rows], near=whole), y[None, rows], PENALTIES[None], balanced_weights(y[None, rows]))
    rng = np.random.default_rng(0)
    far = rng.normal(size=near.coefficients.shape) / x.std(axis=0), rng.normal(size=4)
    for start in ((near.coefficients, near.intercepts), far):
        fit = fit_rows(whole, y[None], PENALTIES[None], weights, start=start)
        assert fit.gap.max() <= 1e-8
        for at, penalty in enumerate(PENALTIES):
            assert fit.objective[at] == pytest.approx(oracle(x, y, penalty)[2], rel=2e-8)


@pytest.mark.parametrize(("n", "d"), [(300, 600), (600, 40)])
def test_converged_problems_do_not_change_while_others_iterate(n: int, d: int) -> None:
    """Steps in the rounding of a gradient lead anywhere, and an easy problem waits long for eleven hard ones."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, d)) * np.exp(-np.arange(d) / (d / 6))
        y = (x @ rng.normal(size=(d, 12)) > 0).T.astype(float)
        space = RowBlock.of(x).space
        costs = torch.from_numpy(balanced_weights(y) * np.r_[1e-3, np.full(11, 1e3)][:, None]).float()
        labels = torch.from_numpy(y).float()
        alone = minimize(space, labels[:1].clone(), costs[:1].clone(), 1e-9)[0]
        among = minimize(space, labels.clone(), costs.clone(), 1e-9)[0]
        torch.testing.assert_close(among, alone, rtol=0, atol=2e-6 * float(alone.abs().max()))
