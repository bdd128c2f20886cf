"""One layer or head: select C by cross-validation, fit on all training rows, score once on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.base import BaseEstimator

from probes.protocol.estimators import Estimator, ModelFit, TrainingRows
from probes.protocol.number_labels import fit_number_cell
from probes.protocol.scoring import (
    auc,
    auc_interval,
    balanced_accuracy,
    balanced_accuracy_interval,
    bootstrap_auc,
    calibration_error,
    log_loss,
    log_odds_slope,
)
from probes.protocol.tasks import Task
from probes.solvers.logistic_float32 import RowBlock, balanced_weights

SCORES = (
    "balanced_accuracy low high auc auc_low auc_high accuracy log_loss calibration control validation C gap "
    "sigma intercepts"
).split()
"""Arrays [K, L, H] of a grid."""


@dataclass(frozen=True)
class Recipe:
    """Settings shared by all cells of a grid."""

    estimator: Estimator
    C: np.ndarray
    """Candidate values."""
    confidence: float
    tolerance: float
    device: str
    own: BaseEstimator | None = None
    """A scikit-learn estimator with its own parameters, of which `estimator` is made."""


SELECTION = 1e-6
"""Tolerance (proven relative gap) of the fits that select C; final fits use the grid's tolerance."""


def choose(
    whole: RowBlock, x: np.ndarray, labels: np.ndarray, fold: np.ndarray, groups: np.ndarray, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Select C for each row of labels by cross-validation.

    Parameters
    ----------
    whole
        The training rows, standardized on all of them.
    x
        [n, D], the same rows before standardization.
    labels
        [Q, n].
    fold, groups
        [n]: of each row. A concept that is rarely defined can be missing in a fold.
    recipe
        The estimator, the values of C and the tolerance.

    Returns
    -------
    C [Q], and at that C: margins [Q, n] of each row from the probe that was not fitted on its fold, and coefficients [Q, D]
    with intercepts [Q], means over folds.
    """
    estimator = recipe.estimator
    values = np.sort(recipe.C)[: None if estimator.loss else 1]  # ties: the smaller C, the stronger penalty
    candidates = np.broadcast_to(values, (len(labels), len(values)))
    margins = np.empty((*candidates.shape, len(x)))
    score = np.zeros(candidates.shape)
    tolerance = max(recipe.tolerance, SELECTION)
    coefficients, intercepts = np.zeros((candidates.size, x.shape[1])), np.zeros(candidates.size)
    for done, number in enumerate(np.unique(fold)):
        left_out, used = fold == number, fold != number
        # Folds share most of their rows: each fit starts at the mean solution of the earlier folds.
        start = (coefficients / done, intercepts / done) if done else None
        rows = TrainingRows(RowBlock.of(x[used], recipe.device, whole), groups[used], tolerance, start)
        fit = estimator.fit(rows, labels[:, used], candidates)
        coefficients += fit.coefficients
        intercepts += fit.intercepts
        fold_margins = fit.decision(x[left_out]).reshape(*candidates.shape, -1)
        margins[:, :, left_out] = fold_margins
        if estimator.loss == "squared":
            # The least-squares intercept: the mean target at the mean of the training rows.
            center = (fit.coefficients @ rows.block.mean + fit.intercepts).reshape(candidates.shape)
            targets = 2 * (labels[:, left_out] - labels[:, used].mean(axis=1, keepdims=True))
            score += ((fold_margins - center[:, :, None] - targets[:, None]) ** 2).sum(axis=2)
    n_folds = len(np.unique(fold))
    coefficients, intercepts = coefficients.reshape(*candidates.shape, -1), intercepts.reshape(candidates.shape)
    if estimator.loss is None:
        return candidates[:, 0].copy(), margins[:, 0], (coefficients[:, 0] / n_folds, intercepts[:, 0] / n_folds)
    if estimator.loss == "log":
        signed = np.where(labels == 1, -1.0, 1.0)[:, None] * margins
        loss = torch.nn.functional.softplus(torch.from_numpy(signed), threshold=40).numpy()  # 4 times as fast as numpy
        score = np.matmul(loss, balanced_weights(labels)[:, :, None])[:, :, 0]
    best = np.argmin(score, axis=1)
    q = np.arange(len(labels))
    return values[best], margins[q, best], (coefficients[q, best] / n_folds, intercepts[q, best] / n_folds)


def fit_cell(
    x: np.ndarray,
    task: Task,
    groups: np.ndarray,
    held_out: np.ndarray,
    recipe: Recipe,
    out: dict[str, np.ndarray],
    cell: tuple[int, int],
) -> None:
    """Select C, fit and score all concepts of a task on features [N, D] of one layer and head, into `out`.

    `groups` [N] are those of all rows, `held_out` the row numbers of the held-out rows.
    """
    if task.numbers:
        fit_number_cell(x, task, held_out, recipe.C, recipe.own, recipe.confidence, out, cell)
        return
    training = x[task.train]
    whole = RowBlock.of(training, recipe.device)
    chosen, left_out, start = choose(whole, training, task.labels, task.fold, groups[task.train], recipe)
    rows = TrainingRows(whole, groups[task.train], recipe.tolerance, start)
    final = recipe.estimator.final or recipe.estimator.fit
    fit = final(rows, task.labels, chosen[:, None])
    n = len(task.concepts)
    weights, intercepts = fit.coefficients.copy(), fit.intercepts.copy()
    scale = np.ones(len(task.labels))

    def margins_of(rows: np.ndarray, count: int | None = None) -> np.ndarray:  # [m, D] -> [Q, m], or [count, m]
        if isinstance(fit, ModelFit):
            return (scale[:, None] * fit.decision(rows))[:count]
        return weights[:count] @ rows.T + intercepts[:count, None]

    if not recipe.estimator.log_odds:
        trained = margins_of(training)
        same = recipe.estimator.final is None
        # Left-out rows give an unbiased slope; a final fit of another method has only its training rows.
        slope = [log_odds_slope(y, m) for y, m in zip(task.labels, left_out if same else trained, strict=True)]
        scale = np.array(slope)
        weights *= scale[:, None]
        intercepts *= scale
    margins = margins_of(x[task.test])  # [Q, n_test]
    scores = np.array([balanced_accuracy(y, m) for y, m in zip(task.test_labels, margins, strict=True)])
    trained = weights[:n] @ training.T
    length = np.linalg.norm(weights[:n], axis=1)
    shared = margins_of(x[held_out], n)
    truths, groups_of, n_groups = task.test_labels[:n], task.test_groups, task.resamples.shape[1]
    low, high = balanced_accuracy_interval(truths, margins[:n], groups_of, n_groups, recipe.confidence)
    areas = np.array([auc(y, m) for y, m in zip(truths, margins[:n], strict=True)])
    draws = bootstrap_auc(truths, margins[:n], groups_of, task.resamples)
    auc_low, auc_high = auc_interval(truths, areas, draws, groups_of, n_groups, recipe.confidence)
    for at, k in enumerate(task.concepts):
        where = (k, *cell)
        truth, margin = task.test_labels[at], margins[at]
        out["balanced_accuracy"][where] = scores[at]
        controlled = len(scores) > n and task.has_control(at)
        out["control"][where] = scores[n + at :: n].mean() if controlled else np.nan
        out["accuracy"][where] = np.mean((margin > 0) == (truth == 1))
        out["validation"][where] = balanced_accuracy(task.labels[at], left_out[at])
        out["low"][where], out["high"][where] = low[at], high[at]
        out["auc"][where] = areas[at]
        out["auc_low"][where], out["auc_high"][where] = auc_low[at], auc_high[at]
        out["log_loss"][where], out["calibration"][where] = log_loss(truth, margin), calibration_error(truth, margin)
        out["C"][where], out["gap"][where] = chosen[at], fit.gap[at]
        out["sigma"][where] = trained[at].std() / length[at] if length[at] != 0 else 0.0
        out["intercepts"][where], out["weights"][where] = intercepts[at], weights[at]
        out["held_out_margins"][where] = shared[at]
