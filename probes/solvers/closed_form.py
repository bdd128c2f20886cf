"""Linear probes with a closed form, on standardised features: ridge, linear discriminant, mean difference.

All thresholds lie midway between the projected class means, so that both classes count the same, as in the score. Ridge
and discriminant share one factorisation for all labels and penalties.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probes.solvers.logistic_reference import LogisticFit


@dataclass(frozen=True)
class Spectrum:
    """Right singular vectors and values of standardised features: what every closed form is made of."""

    features: np.ndarray
    """float64 [n, D]."""

    @cached_property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues [r] and eigenvectors [D, r] of ``X'X`` that are not zero, by way of the smaller Gram matrix."""
        x = self.features
        wide = x.shape[1] > x.shape[0]
        values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
        kept = values > max(x.shape) * np.finfo(float).eps * max(float(values[-1]), 0.0)
        values, vectors = values[kept], vectors[:, kept]
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


def ridge(spectrum: Spectrum, labels: np.ndarray, penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares on centred -1/+1 labels: minimise ``||y - Xw||^2 + ||w||^2 / C`` (Hoerl and Kennard 1970).

    Parameters
    ----------
    spectrum
        Of centred features [n, D].
    labels
        [Q, n] in 0, 1.
    penalty
        C, [Q, R].

    Returns
    -------
    Weights float64 [Q, R, D] and intercepts [Q, R].
    """
    values, axes = spectrum.parts
    high, low, positive = class_sums(spectrum.features, labels)
    # X'(y - mean y) of centred features, y in -1, +1.
    pull = 2 * positive[:, None] * high @ axes
    shrink = 1 / (values + 1 / penalty[:, :, None])
    weights = (pull[:, None] * shrink) @ axes.T
    return weights, midway(weights, high[:, None], low[:, None])


def discriminant(spectrum: Spectrum, labels: np.ndarray, penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fisher's linear discriminant with ridge ``S + I / (C n)`` on the pooled within-class covariance S (divided by n).

    Margins are log-odds of the Gaussian model with equal priors. Shapes as in `ridge`. Features that do not vary at all
    get no weight.

    Notes
    -----
    The within-class covariance is the total one minus a rank-one term along the difference of means, so one
    factorisation serves all labels (Sherman and Morrison 1950).
    """
    values, axes = spectrum.parts
    n = labels.shape[1]
    high, low, positive = class_sums(spectrum.features, labels)
    gap = high - low
    inner = gap @ axes
    solved = inner[:, None] / (values / n + 1 / (penalty[:, :, None] * n))  # total covariance [Q, R, r]
    share = (positive * (n - positive) / n**2)[:, None]
    rest = 1 - share * np.einsum("qr,qcr->qc", inner, solved)
    weights = (solved / np.maximum(rest, 1e-12)[:, :, None]) @ axes.T
    return weights, midway(weights, high[:, None], low[:, None])


def mean_difference(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Difference of class means (mass mean; Marks and Tegmark 2023): weights [Q, D], intercepts [Q].

    It is taken in the units of the features, not standardised: features [n, D], labels [Q, n].
    """
    high, low, _ = class_sums(features, labels)
    weights = high - low
    return weights, midway(weights, high, low)


def unstandardise(weights: np.ndarray, intercepts: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> LogisticFit:
    """Turn weights [P, D] of standardised features into ones of the features as given; nothing to certify (gap 0)."""
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    raw = weights * inverse
    nothing = np.zeros(len(raw))
    return LogisticFit(raw, intercepts - raw @ mean, nothing, nothing, np.broadcast_to(deviation, raw.shape))
