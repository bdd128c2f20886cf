"""Linear probes with closed-form solutions, on standardized features: ridge, linear discriminant, mean difference.

All thresholds are midway between the projected class means, which balances the classes, as in the score. Ridge and
discriminant share one factorization for all labels and values of C.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probes.solvers.logistic_reference import LinearFit


@dataclass(frozen=True)
class Spectrum:
    """Right singular vectors and squared singular values of standardized features, shared by all closed forms."""

    features: np.ndarray
    """float64 [n, D]."""

    @cached_property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues [r] and eigenvectors [D, r] of ``X'X`` that are not zero, computed from the smaller Gram matrix."""
        x = self.features
        wide = x.shape[1] > x.shape[0]
        values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
        nonzero = values > max(x.shape) * np.finfo(float).eps * max(float(values[-1]), 0.0)
        values, vectors = values[nonzero], vectors[:, nonzero]
        return values, (x.T @ vectors) / np.sqrt(values) if wide else vectors


def class_sums(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the means of both classes [Q, D] each, and the number of positives [Q], for labels [Q, n]."""
    positive = labels.sum(axis=1)
    up = labels @ features
    down = features.sum(axis=0) - up
    return up / positive[:, None], down / (labels.shape[1] - positive)[:, None], positive


def midway(weights: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return intercepts that put the threshold midway between class means [..., D] projected on weights [..., D]."""
    return -0.5 * np.einsum("...d,...d->...", weights, high + low)


def ridge(spectrum: Spectrum, labels: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit least squares on centered -1/+1 labels: minimize ``||y - Xw||^2 + ||w||^2 / C`` (Hoerl and Kennard 1970).

    Parameters
    ----------
    spectrum
        Of centered features [n, D].
    labels
        [Q, n] in 0, 1.
    C
        Inverse penalties [Q, R].

    Returns
    -------
    Weights float64 [Q, R, D] and intercepts [Q, R].
    """
    values, axes = spectrum.parts
    high, low, positive = class_sums(spectrum.features, labels)
    # X'(y - mean y) of centered features, y in -1, +1.
    targets = 2 * positive[:, None] * high @ axes
    shrink = 1 / (values + 1 / C[:, :, None])
    weights = (targets[:, None] * shrink) @ axes.T
    return weights, midway(weights, high[:, None], low[:, None])


def ridge_numbers(spectrum: Spectrum, targets: np.ndarray, C: np.ndarray) -> np.ndarray:
    """Fit least squares on numbers: minimize ``||y - mean y - Xw||^2 + ||w||^2 / C`` (Hoerl and Kennard 1970).

    Equals ``sklearn.linear_model.Ridge(alpha=1 / C)``; the intercept is the mean of the targets. Centered features [n, D],
    targets [Q, n], C [Q, R] -> weights float64 [Q, R, D].
    """
    values, axes = spectrum.parts
    projected = (targets - targets.mean(axis=1, keepdims=True)) @ spectrum.features @ axes
    return (projected[:, None] / (values + 1 / C[:, :, None])) @ axes.T


def discriminant(spectrum: Spectrum, labels: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit Fisher's linear discriminant with ridge ``S + I / (C n)`` on the pooled within-class covariance S (divided by n).

    Margins are log-odds of the Gaussian model with equal priors. Shapes as in `ridge`. Constant features
    get weight 0.

    Notes
    -----
    The within-class covariance is the total one minus a rank-one term along the difference of means, so one
    factorization serves all labels (Sherman and Morrison 1950).
    """
    values, axes = spectrum.parts
    n = labels.shape[1]
    high, low, positive = class_sums(spectrum.features, labels)
    gap = high - low
    inner = gap @ axes
    solved = inner[:, None] / (values / n + 1 / (C[:, :, None] * n))  # total covariance [Q, R, r]
    share = (positive * (n - positive) / n**2)[:, None]
    denominator = 1 - share * np.einsum("qr,qcr->qc", inner, solved)
    weights = (solved / np.maximum(denominator, 1e-12)[:, :, None]) @ axes.T
    return weights, midway(weights, high[:, None], low[:, None])


def mean_difference(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the difference of class means (mass mean; Marks and Tegmark 2023): weights [Q, D], intercepts [Q].

    It is computed in the units of the features, not standardized: features [n, D], labels [Q, n].
    """
    high, low, _ = class_sums(features, labels)
    weights = high - low
    return weights, midway(weights, high, low)


def unstandardize(weights: np.ndarray, intercepts: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> LinearFit:
    """Convert weights [P, D] of standardized features to the original units; the gap of a closed form is 0."""
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    raw = weights * inverse
    zeros = np.zeros(len(raw))
    return LinearFit(raw, intercepts - raw @ mean, zeros, zeros, np.broadcast_to(deviation, raw.shape))
