"""Many L2-regularized logistic regressions on one feature matrix, solved as a batch and certified.

All problems (concepts x folds x penalties) share the features, so each Newton step is a few matrix products over the
whole batch. The training fold of a problem is expressed as row weights, and its standardization as a rescaling of the
columns: shifting the columns changes only the intercept, which is not penalized, so one centered copy of the features is
exact for every fold.

The certificate is a duality gap: any dual feasible point bounds the optimum from below, so the bound on
``F(w) - min F`` holds for any path of the iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count
from probes.solvers.newton import Batch, Design, minimize

CHUNK_ELEMENTS = 100_000
"""Maximum problems x rows per batch of the iterations (about ten float64 arrays of this size)."""


@dataclass(frozen=True)
class LinearFit:
    """Solutions of a batch of problems, in the original units of the features.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import fit_logistic
    >>> fit = fit_logistic(np.array([[0.0], [1.0], [3.0], [4.0]]), np.array([0, 0, 1, 1]), C=1.0)
    >>> fit.coefficients.shape, bool(fit.gap[0] < 1e-8), fit.decision(np.array([[0.0], [5.0]]))[0] > 0
    ((1, 1), True, array([False,  True]))
    """

    coefficients: np.ndarray
    """float64 [P, D]: weight of each feature."""
    intercepts: np.ndarray
    """float64 [P]."""
    objective: np.ndarray
    """float64 [P]: ``0.5 ||w||^2 + C sum(weight * loss)``, w in standardized units if `standardize` was set."""
    gap: np.ndarray
    """float64 [P]: proven upper bound on ``(objective - minimum) / objective``."""
    scale: np.ndarray
    """float64 [P, D]: the standard deviations that the penalty is relative to (1 without standardization)."""

    __repr__ = short_repr

    def decision(self, features: np.ndarray) -> np.ndarray:
        """Return margins float64 [P, N] of features [N, D]; positive means class 1."""
        return self.coefficients @ np.asarray(features, dtype=np.float64).T + self.intercepts[:, None]


def fit_logistic(
    features: np.ndarray | Design,
    labels: np.ndarray,
    C: float | np.ndarray,
    weights: np.ndarray | None = None,
    *,
    standardize: bool = True,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
) -> LinearFit:
    """Fit a batch of L2-regularized logistic regressions that share their features.

    Each problem minimizes ``0.5 ||w||^2 + C sum_i weight_i log(1 + exp(-y_i (w.x_i + b)))`` over w and b, the
    parametrization of scikit-learn's `LogisticRegression` (b is not penalized). With `standardize` the penalty applies
    to features divided by their standard deviation over the problem's rows of positive weight, which equals fitting
    behind a `StandardScaler` trained on those rows; a feature that is constant there gets weight 0.

    Parameters
    ----------
    features
        [N, D], or a `Design` prepared from it (faster if several calls share the features).
    labels
        [P, N] or [N], 0 or 1; ignored where the weight is 0.
    C
        Inverse penalty, a scalar or [P]: larger means less regularization.
    weights
        Non-negative [P, N] or [N]; 0 excludes a row from the problem and its standardization. None: all 1.
    standardize
        Whether features are scaled to unit deviation within each problem's rows.
    tolerance
        Maximum proven relative gap to the minimum.
    max_iterations
        Maximum number of Newton iterations.

    Raises
    ------
    ProbeError
        If shapes disagree, features or weights are not finite, C is not positive, a problem has only one class, or
        the certificate was not reached.

    Notes
    -----
    Damped Newton iterations in float64. The Newton system is solved directly for narrow features, and by conjugate
    gradients for wide ones, in the principal axes of the features, where it is diagonal for equal row weights.
    The gap is Fenchel's: with ``a_i = sigma(-y_i m_i)`` made feasible, ``F(w, b) - D(a)``; at an exact
    intercept it equals ``||grad_w||^2 / 2``.

    Examples
    --------
    The same optimum as scikit-learn, with a proven distance to it:

    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from probes import fit_logistic
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 3)), rng.random(60) < 0.5
    >>> fit = fit_logistic(x, y, C=0.5, standardize=False, tolerance=1e-12)
    >>> reference = LogisticRegression(C=0.5, tol=1e-10).fit(x, y)
    >>> bool(np.allclose(fit.coefficients, reference.coef_, atol=1e-4)), bool(fit.gap[0] <= 1e-12)
    (True, True)
    """
    design = features if isinstance(features, Design) else Design.of(features)
    signs, row_weights, strengths = _problems(design.n_rows, labels, C, weights)
    scale = design.scales(row_weights > 0) if standardize else np.ones((len(signs), design.width))
    # Columns of the shared design have unit global deviation; the ratio converts them to each problem's units.
    with np.errstate(divide="ignore"):
        ratio = np.where(scale > 0, design.deviation / np.where(scale > 0, scale, 1.0), 0.0)
    theta = np.empty((len(signs), design.width))
    intercept, objective, gap = (np.empty(len(signs)) for _ in range(3))
    for part in _chunks(len(signs), design.n_rows):
        batch = Batch(design, signs[part], row_weights[part] * strengths[part, None], ratio[part])
        theta[part], intercept[part], objective[part], gap[part] = minimize(batch, tolerance, max_iterations)
    failed = np.flatnonzero(~(gap <= tolerance))
    if failed.size:
        worst = failed[np.argmax(gap[failed])]
        msg = (
            f"{failed.size} of {len(signs)} logistic fits did not reach a relative gap of {tolerance:g} in "
            f"{max_iterations} iterations (worst {gap[worst]:.3g} at C={strengths[worst]:g}): "
            f"use a smaller C or a larger tolerance"
        )
        raise ProbeError(msg)
    coefficients = theta * np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    coefficients[:, design.deviation == 0] = 0.0
    return LinearFit(coefficients, intercept - coefficients @ design.mean, objective, gap, scale)


def _chunks(n_problems: int, n_rows: int) -> Iterator[slice]:
    """Yield slices of problems of about `CHUNK_ELEMENTS` problems x rows, at least 16 problems."""
    step = max(16, CHUNK_ELEMENTS // max(1, n_rows))
    for start in range(0, n_problems, step):
        yield slice(start, min(start + step, n_problems))


def _problems(
    n_rows: int, labels: np.ndarray, C: float | np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validate a batch and broadcast it to signs -1/+1 [P, N], weights [P, N] and C [P]."""
    y = np.atleast_2d(np.asarray(labels, dtype=np.float64))
    w = np.ones((1, n_rows)) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))
    c = np.atleast_1d(np.asarray(C, dtype=np.float64))
    count = max(len(y), len(w), len(c))
    if y.shape[1] != n_rows or w.shape[1] != n_rows or any(len(part) not in {1, count} for part in (y, w, c)):
        msg = (
            f"labels {y.shape}, weights {w.shape} and C {c.shape} do not fit features of "
            f"{format_count(n_rows, 'row')}: give [P, {n_rows}], [P, {n_rows}] and [P]"
        )
        raise ProbeError(msg)
    if not (np.isfinite(c).all() and (c > 0).all()):
        msg = f"C must be positive and finite, got {c.min():g} to {c.max():g}"
        raise ProbeError(msg)
    if not np.isfinite(w).all() or (w < 0).any():
        msg = "row weights must be finite and not negative"
        raise ProbeError(msg)
    y, w, c = np.broadcast_to(y, (count, n_rows)), np.broadcast_to(w, (count, n_rows)), np.broadcast_to(c, (count,))
    used = w > 0
    if not np.isin(y[used], (0.0, 1.0)).all():
        msg = "labels must be 0 or 1 wherever the weight is positive"
        raise ProbeError(msg)
    positive = ((y == 1) & used).sum(axis=1)
    single = np.flatnonzero((positive == 0) | (positive == used.sum(axis=1)))
    if single.size:
        msg = f"problem {single[0]} of {count} has only one class among its {format_count(int(used[single[0]].sum()), 'row')}"
        raise ProbeError(msg)
    return np.where(y == 1, 1.0, -1.0), w, c
