"""Multinomial (softmax) logistic regression: the weights of all classes fitted jointly, with a proven gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.short_repr import short_repr
from probes.solvers.closed_form import Spectrum


@dataclass(frozen=True)
class MultinomialFit:
    """One solution, in the units of the features passed to the solver."""

    coefficients: np.ndarray
    """float64 [K, D]."""
    intercepts: np.ndarray
    """float64 [K]; shifted to mean 0, which changes no probability."""
    objective: float
    gap: float
    """Proven upper bound on ``(objective - minimum) / objective``."""

    __repr__ = short_repr


def class_weights(classes: np.ndarray, count: int) -> np.ndarray:
    """Return row weights that balance the classes (scikit-learn's ``class_weight="balanced"``): int [n] -> [n]."""
    return len(classes) / (count * np.bincount(classes, minlength=count))[classes]


def fit_multinomial(
    spectrum: Spectrum,
    classes: np.ndarray,
    count: int,
    C: float,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
    start: MultinomialFit | None = None,
    balanced: bool = True,
) -> MultinomialFit:
    """Minimize ``0.5 ||W||^2 + C sum_i c_i (log sum_k exp(m_ik) - m_i,class(i))``, ``m = X W' + b``.

    The parametrization of scikit-learn's `LogisticRegression` for more than two classes, by default with
    ``class_weight="balanced"``.

    Parameters
    ----------
    spectrum
        Of standardized features [n, D].
    classes
        int [n], in 0 .. count - 1; every class occurs.
    count
        K, two or more.
    C
        Inverse penalty.
    tolerance
        Maximum proven relative gap.
    max_iterations
        Maximum number of Newton steps.
    start
        Initial point; the proven gap holds for any initial point.
    balanced
        Whether all classes have equal weight; otherwise all rows have the weight 1.

    Raises
    ------
    ProbeError
        If the tolerance is not reached.

    Notes
    -----
    Newton's method in float64 in the principal axes of the features; its systems are solved by conjugate gradients, with the
    Hessian for equal row weights, which is diagonal in these axes, as preconditioner. The gap is Fenchel's, as in
    `probes.solvers.duality_gap.certify`: with ``p = softmax(m)`` moved along its derivative, ``q = p - p (t - p't)``, so that
    ``sum_i c_i (q_i - y_i) = 0``, it is ``0.5 ||W + sum_i c_i (q_i - y_i) x_i'||^2`` plus the divergence of q
    from p, bounded by chi-square, ``sum_i c_i sum_k p_ik (t_k - p_i't)^2``. That holds where all ``|t_k - p_i't| <= 1``.
    """
    _, axes = spectrum.parts
    table = np.column_stack([spectrum.features @ axes, np.ones(len(classes))])  # [n, r + 1], the intercept last
    squares = (table**2).sum(axis=0)
    target = np.eye(count)[classes]
    costs = C * (class_weights(classes, count) if balanced else np.ones(len(classes)))[:, None]
    penalized = np.append(np.ones(axes.shape[1]), 0.0)[:, None]  # 1 for penalized rows of v, 0 for the intercept

    v = np.zeros((table.shape[1], count))
    if start is not None:
        v[:-1], v[-1] = axes.T @ start.coefficients.T, start.intercepts
    margins = table @ v
    value, p = _loss(margins, target, costs, v, penalized)
    gap = np.inf
    for _ in range(max_iterations):
        residual = costs * (p - target)
        gradient = table.T @ residual + penalized * v
        gap = _gap(table, p, residual, costs, v, penalized) / value
        if gap <= tolerance:
            weights = (axes @ v[:-1]).T
            return MultinomialFit(weights, v[-1] - v[-1].mean(), value, gap)
        step = _newton_step(table, p, costs, gradient, penalized, squares)
        moved, slope = table @ step, float((gradient * step).sum())
        size, new = 1.0, value
        for _ in range(40):
            new, p = _loss(margins + size * moved, target, costs, v + size * step, penalized)
            # Near the optimum the change is below rounding errors: the full step is then accepted.
            if new <= value + 1e-4 * size * slope or -slope <= 1e-12 * value:
                break
            size *= 0.5
        v, margins, value = v + size * step, margins + size * moved, new
    msg = (
        f"a multinomial fit of {count} classes did not reach a relative gap of {tolerance:g} in {max_iterations} iterations "
        f"(it is {gap:.3g} at C={C:g}): use a smaller C or a larger tolerance"
    )
    raise ProbeError(msg)


def _loss(
    margins: np.ndarray, target: np.ndarray, costs: np.ndarray, v: np.ndarray, penalized: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the objective and probabilities [n, K]."""
    top = margins.max(axis=1, keepdims=True)
    p = np.exp(margins - top)
    total = p.sum(axis=1, keepdims=True)
    loss = np.log(total) + top - (margins * target).sum(axis=1, keepdims=True)
    return float((costs * loss).sum() + 0.5 * (penalized * v * v).sum()), p / total


def _gap(
    table: np.ndarray, p: np.ndarray, residual: np.ndarray, costs: np.ndarray, v: np.ndarray, penalized: np.ndarray
) -> float:
    """Bound the objective's distance from its minimum (see `fit_multinomial`)."""
    hessian = np.diag((costs * p).sum(axis=0)) - p.T @ (costs * p)
    t = np.linalg.lstsq(hessian, residual.sum(axis=0), rcond=None)[0]
    lead = t - p @ t[:, None]  # [n, K]
    if np.abs(lead).max() > 1:
        return np.inf
    dual_residual = (table.T @ (residual - costs * p * lead) + penalized * v)[:-1]
    return float(0.5 * (dual_residual**2).sum() + (costs * p * lead**2).sum())


def _newton_step(
    table: np.ndarray,
    p: np.ndarray,
    costs: np.ndarray,
    gradient: np.ndarray,
    penalized: np.ndarray,
    squares: np.ndarray,
) -> np.ndarray:
    """Solve the Newton system by preconditioned conjugate gradients, with a tolerance that tightens near the optimum."""

    def hessian(d: np.ndarray) -> np.ndarray:
        m = table @ d
        return table.T @ (costs * p * (m - (p * m).sum(axis=1, keepdims=True))) + penalized * d

    curvature = (costs * p * (1 - p)).sum(axis=0) / len(p)
    diagonal = np.maximum(penalized + squares[:, None] * curvature, np.finfo(float).tiny)
    step, residual = np.zeros_like(gradient), -gradient
    z = residual / diagonal
    direction, rho = z, float((residual * z).sum())
    target = min(1e-2, np.sqrt(rho / (1 + rho))) ** 2 * rho
    for _ in range(4 * (len(gradient) + 10)):
        if rho <= target:
            break
        image = hessian(direction)
        along = float((direction * image).sum())
        if not along > 0:
            break
        alpha = rho / along
        step, residual = step + alpha * direction, residual - alpha * image
        z = residual / diagonal
        new = float((residual * z).sum())
        direction, rho = z + (new / rho) * direction, new
    return step
