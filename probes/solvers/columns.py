"""Which columns of a table of features vary, and whether a probe can tell: the same rule for every estimator."""

from __future__ import annotations

import numpy as np

from groundscope.core.errors import ProbeError

RESOLVED = 1e-11
"""Deviations under this share of a column's mean are refused: in float64 margins would be wrong in the fifth digit."""


def column_scales(mean: np.ndarray, deviation: np.ndarray, n_rows: int) -> np.ndarray:
    """Return deviations that features may be divided by: 0 for columns that do not vary.

    A column is constant where its deviation is no more than what rounding leaves of equal values,
    ``n_rows * eps * |mean|`` (scikit-learn's rule, `sklearn.preprocessing.StandardScaler`). So a massive activation of mean
    1e8 and deviation 1 is used like any other.

    Parameters
    ----------
    mean, deviation
        float64 [D]: of each column over `n_rows` rows.
    n_rows
        N.

    Returns
    -------
    float64 [D], finite.

    Raises
    ------
    ProbeError
        Where a column varies by less than `RESOLVED` of its mean, and more than by rounding.
    """
    size = np.abs(mean)
    varies = deviation > n_rows * np.finfo(np.float64).eps * size
    unclear = np.flatnonzero(varies & (deviation < RESOLVED * size))
    if len(unclear):
        column = int(unclear[0])
        msg = (
            f"feature column {column} has mean {mean[column]:.6g} and standard deviation {deviation[column]:.3g}: float64 "
            f"cannot resolve margins on it (a deviation of at least {RESOLVED:g} of the mean is needed); subtract its mean, or "
            f"leave the column out"
        )
        raise ProbeError(msg)
    return np.where(varies, deviation, 0.0)
