"""One fit of a predictive family: training rows in, a reader of new rows out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Predictor = Callable[[np.ndarray], np.ndarray]
"""Maps features [m, k] to log-probabilities of the classes, float64 [m, K], in nats."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Training rows of one fit."""

    features: np.ndarray
    """float64 [n, k], with mean squared norm about k."""
    classes: np.ndarray
    """int [n], in 0 .. count - 1; every class occurs."""
    count: int
    """Number of classes, K."""
    base: Predictor
    """Reader that the fit may start from: the class shares of these rows, or that of `PredictiveFamily.base`."""


def share_predictor(classes: np.ndarray, count: int) -> Predictor:
    """Return the reader that ignores features: the class shares of the training rows."""
    log_shares = np.log(np.bincount(classes, minlength=count) / len(classes))
    return lambda features: np.tile(log_shares, (len(features), 1))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities of logits [..., K]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
