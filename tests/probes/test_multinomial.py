"""The multinomial probe against scikit-learn at 1e-10, and its certificate against the truth."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from groundscope.core.errors import ProbeError
from probes import LogisticProbe, MultinomialProbe
from probes.solvers.closed_form import Spectrum
from probes.solvers.multinomial import fit_multinomial


def make(kind: str, n: int, d: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and classes; each class occurs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.uniform(0.01, 100, d) + rng.normal(size=d) * 50
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    noise = 0.0 if kind == "separable" else 1.0
    y = (z @ rng.normal(size=(d, count)) + noise * np.sqrt(d) * rng.normal(size=(n, count))).argmax(axis=1)
    if kind == "collinear":
        x[:, 1] = 3 * x[:, 0] - 2
    elif kind == "constant":
        x[:, 0] = 0.1
    elif kind == "unbalanced":
        y[:] = 0
    y[:count] = np.arange(count)
    return x, y


def objective(z: np.ndarray, y: np.ndarray, C: float, w: np.ndarray, b: np.ndarray) -> float:
    weights = (len(y) / (len(b) * np.bincount(y)))[y]
    return float(0.5 * (w**2).sum() - C * weights @ log_softmax(z @ w.T + b, axis=1)[np.arange(len(y)), y])


@given(
    kind=st.sampled_from(["random", "separable", "collinear", "unbalanced", "constant"]),
    n=st.integers(15, 80),
    d=st.integers(2, 120),
    count=st.integers(3, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15)
def test_agrees_with_scikit_learn_and_never_claims_more_than_it_has(
    kind: str, n: int, d: int, count: int, seed: int
) -> None:
    x, y = make(kind, n, d, count, seed)
    z = StandardScaler().fit_transform(x)
    for C in (1e-3, 1.0, 50.0):
        probe = MultinomialProbe(C).fit(x, y)
        true = LogisticRegression(C=C, class_weight="balanced", tol=1e-10, solver="newton-cholesky", max_iter=1000)
        with warnings.catch_warnings():
            # At the last digit its line search may find nothing better and warn; the bounds below judge the result.
            warnings.simplefilter("ignore", ConvergenceWarning)
            true.fit(z, y)
        best = objective(z, y, C, true.coef_, true.intercept_)
        weights = probe.coef_ * x.std(axis=0)
        value = objective(z, y, C, weights, probe.intercept_ + probe.coef_ @ x.mean(axis=0))
        assert probe.gap_ <= 1e-8
        assert value * (1 - probe.gap_) <= best * (1 + 1e-9)
        assert value <= best * (1 + 2e-8)
        scale = max(1.0, float(np.abs(true.coef_).max()))
        assert np.abs(weights - true.coef_).max() <= 1e-2 * scale
        np.testing.assert_allclose(probe.predict_proba(x), true.predict_proba(z), atol=2e-3)
        assert (probe.predict(x) == probe.predict_proba(x).argmax(axis=1)).all()


def test_the_gap_bounds_how_far_any_tolerance_stopped() -> None:
    x, y = make("random", 300, 12, 4, 0)
    spectrum = Spectrum(StandardScaler().fit_transform(x))
    best = fit_multinomial(spectrum, y, 4, 1.0, tolerance=1e-13)
    gaps = []
    for tolerance in (0.5, 1e-1, 1e-3, 1e-5, 1e-9):
        fit = fit_multinomial(spectrum, y, 4, 1.0, tolerance=tolerance)
        assert fit.objective == pytest.approx(objective(spectrum.features, y, 1.0, fit.coefficients, fit.intercepts))
        assert fit.objective - best.objective <= fit.gap * fit.objective * (1 + 1e-9)
        assert fit.gap <= tolerance
        gaps.append(fit.gap)
    assert gaps[0] > 1e-3  # it does stop early, so that the bound was put to the test
    far = fit_multinomial(spectrum, y, 4, 100.0)
    warm = fit_multinomial(spectrum, y, 4, 1.0, start=far)
    np.testing.assert_allclose(warm.coefficients, best.coefficients, atol=1e-3)


def test_two_classes_are_the_binary_probe_of_half_the_penalty() -> None:
    """The penalty of ``(-w, w)`` is twice that of w, for a difference of 2 w."""
    x, y = make("random", 200, 6, 2, 1)
    multinomial, binary = MultinomialProbe(0.5).fit(x, y), LogisticProbe(1.0).fit(x, y)
    np.testing.assert_allclose(multinomial.decision_function(x), binary.decision_function(x), atol=2e-3)
    np.testing.assert_allclose(multinomial.predict_proba(x), binary.predict_proba(x), atol=1e-3)


def test_near_classes_are_separated_although_a_third_is_far_away() -> None:
    """Probes fitted each against the rest give way to the far one; fitted together they need not."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, 500)
    x = np.column_stack([np.array([0, 4, 8, 100])[y] + rng.normal(size=500), rng.normal(size=500)])
    assert MultinomialProbe(10.0).fit(x, y).score(x, y) > 0.95
    assert OneVsRestClassifier(LogisticProbe(10.0)).fit(x, y).score(x, y) < 0.87


def test_an_unreachable_tolerance_is_an_error() -> None:
    x, y = make("random", 60, 5, 3, 2)
    with pytest.raises(ProbeError, match=r"did not reach a relative gap of 1e-12 in 2 iterations .* larger tolerance"):
        fit_multinomial(Spectrum(x), y, 3, 1.0, tolerance=1e-12, max_iterations=2)
