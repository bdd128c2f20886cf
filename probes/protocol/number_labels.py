"""Numbers as labels: ridge regression, with C selected by cross-validation, scored once by R2 on held-out rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone

from groundscope.core.errors import ProbeError
from probes.protocol.tasks import Task
from probes.solvers.closed_form import Spectrum, ridge_numbers, unstandardize
from probes.solvers.logistic_reference import LinearFit

NUMBER_SCORES = ("r2", "r2_low", "r2_high")
"""Arrays [K, L, H] of a grid that has concepts with numbers as labels."""


def r2(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the coefficient of determination of predictions [..., N] of targets [..., N]; NaN for constant targets.

    ``1 - sum (y - p)^2 / sum (y - mean y)^2``: 1 is perfect, 0 is the mean of these targets, below 0 is worse than it.
    """
    residual = ((targets - predictions) ** 2).sum(axis=-1)
    total = ((targets - np.mean(targets, axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    return 1 - np.divide(residual, total, out=np.full(np.shape(residual), np.nan), where=total > 0)


def r2_interval(
    targets: np.ndarray, predictions: np.ndarray, groups: np.ndarray, counts: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return percentile intervals of R2 over whole groups (cluster bootstrap).

    Parameters
    ----------
    targets, predictions
        [M, N].
    groups
        int [N]: number of the group of each column.
    counts
        [B, G]: count of each group in each resample.
    confidence
        Nominal coverage.

    Returns
    -------
    Low and high ends float64 [M].
    """
    w, n_groups = np.asarray(counts, dtype=np.float64), counts.shape[1]
    centered = targets - targets.mean(
        axis=1, keepdims=True
    )  # R2 does not depend on the origin; small numbers are exact

    def totals(values: np.ndarray) -> np.ndarray:  # [M, N] -> [B, M]
        return w @ np.array([np.bincount(groups, row, minlength=n_groups) for row in values]).T

    rows = w @ np.bincount(groups, minlength=n_groups)  # [B]
    total = totals(centered**2) - totals(centered) ** 2 / np.maximum(rows, 1)[:, None]
    residual = totals((targets - predictions) ** 2)
    draws = 1 - np.divide(residual, total, out=np.full(total.shape, np.nan), where=total > 0)
    ends = np.full((2, len(targets)), np.nan)
    defined = ~np.isnan(draws).all(axis=0)
    ends[:, defined] = np.nanquantile(draws[:, defined], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return ends[0], ends[1]


def fit_number_cell(
    x: np.ndarray,
    task: Task,
    held_out: np.ndarray,
    candidates: np.ndarray,
    regressor: BaseEstimator | None,
    confidence: float,
    out: dict[str, np.ndarray],
    cell: tuple[int, int],
) -> None:
    """Select C, fit and score all concepts of a task of numbers on features [N, D] of one layer or head, into `out`.

    Parameters
    ----------
    x
        Features of all rows.
    task
        The numbers, with their shuffles.
    held_out
        Row numbers of the held-out rows.
    candidates
        Values of C; for `regressor`, unused.
    regressor
        A scikit-learn regressor with its own parameters, fitted on standardized features; None: ridge.
    confidence
        Of the interval.
    out
        The grid's arrays of one layer.
    cell
        Index of the layer and the head.

    Raises
    ------
    ProbeError
        If a regressor sets no linear coefficients, which the grid needs for its directions and held-out predictions.
    """
    training, y = x[task.train], task.labels
    values = np.sort(candidates) if regressor is None else np.array([np.nan])  # ties: the smaller C
    predictions = np.empty((len(y), len(values), len(training)))
    for number in np.unique(task.fold):
        left_out, used = task.fold == number, task.fold != number
        fit = _fit(training[used], y[:, used], np.broadcast_to(values, (len(y), len(values))), regressor)
        predictions[:, :, left_out] = fit.decision(training[left_out]).reshape(len(y), len(values), -1)
    best = np.argmin(((predictions - y[:, None]) ** 2).sum(axis=2), axis=1)
    validation = r2(y, predictions[np.arange(len(y)), best])
    fit = _fit(training, y, values[best][:, None], regressor)
    predicted = fit.decision(x[task.test])
    scores, n = r2(task.test_labels, predicted), len(task.concepts)
    low, high = r2_interval(task.test_labels[:n], predicted[:n], task.test_groups, task.resamples, confidence)
    length = np.linalg.norm(fit.coefficients[:n], axis=1)
    projected, shared = fit.coefficients[:n] @ training.T, fit.decision(x[held_out])
    for at, k in enumerate(task.concepts):
        where = (k, *cell)
        out["r2"][where], out["r2_low"][where], out["r2_high"][where] = scores[at], low[at], high[at]
        controlled = len(scores) > n and task.has_control(at)
        out["control"][where] = scores[n + at :: n].mean() if controlled else np.nan
        out["validation"][where] = validation[at]
        out["C"][where], out["gap"][where] = values[best[at]], fit.gap[at]
        out["sigma"][where] = projected[at].std() / length[at] if length[at] > 0 else 0.0
        out["intercepts"][where], out["weights"][where] = fit.intercepts[at], fit.coefficients[at]
        out["held_out_margins"][where] = shared[at]


def _fit(x: np.ndarray, y: np.ndarray, C: np.ndarray, regressor: BaseEstimator | None) -> LinearFit:
    """Fit numbers [Q, n] on features [n, D] for values of C [Q, R]: Q x R fits, C fastest, in the units of the features."""
    from probes.solvers.logistic_float32 import RowBlock  # imports torch, which readers of grids do not need

    block = RowBlock.of(x)
    standard = block.standard.cpu().numpy()
    if regressor is None:
        weights = ridge_numbers(Spectrum(standard), y, C)
        center = np.repeat(y.mean(axis=1), C.shape[1])
        return unstandardize(weights.reshape(-1, x.shape[1]), center, block.mean, block.deviation)
    weights, intercepts = np.empty((len(y), x.shape[1])), np.empty(len(y))
    for q, row in enumerate(y):
        model: Any = clone(regressor)
        model.fit(standard, row)
        model = getattr(model, "best_estimator_", model)
        if np.size(getattr(model, "coef_", ())) != x.shape[1]:
            msg = (
                f"{regressor!r} sets no coef_ of {x.shape[1]} values: a grid predicts numbers with a linear regressor, for "
                "example sklearn.linear_model.Lasso(0.1)"
            )
            raise ProbeError(msg)
        weights[q], intercepts[q] = np.ravel(model.coef_), np.ravel(model.intercept_)[0]
    fit = unstandardize(weights, intercepts, block.mean, block.deviation)
    fit.gap[:] = np.nan  # its optimum is not certified
    return fit
