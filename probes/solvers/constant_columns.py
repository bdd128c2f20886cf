"""The rule of all estimators for constant feature columns, and for columns that vary too little for float64."""

from __future__ import annotations

import numpy as np

from groundscope.core.errors import ProbeError

RESOLVED = 1e-11
"""Smaller ratios of deviation to mean are errors: in float64, margins would be wrong in the fifth digit."""


def column_scales(mean: np.ndarray, deviation: np.ndarray, n_rows: int) -> np.ndarray:
    """Return the deviations to divide features by: 0 for constant columns.

    A column is constant if its deviation does not exceed the rounding error of equal values,
    ``n_rows * eps * |mean|`` (scikit-learn's rule, `sklearn.preprocessing.StandardScaler`). A massive activation with mean
    1e8 and deviation 1 is therefore not constant.

    Parameters
    ----------
    mean, deviation
        float64 [D]: of each column over `n_rows` rows.
    n_rows
        Number of rows N.

    Returns
    -------
    float64 [D], finite.

    Raises
    ------
    ProbeError
        If a column varies by less than `RESOLVED` of its mean, but by more than rounding.
    """
    size = np.abs(mean)
    varies = deviation > n_rows * np.finfo(np.float64).eps * size
    unresolved = np.flatnonzero(varies & (deviation < RESOLVED * size))
    if len(unresolved):
        column = int(unresolved[0])
        msg = (
            f"feature column {column} has mean {mean[column]:.6g} and standard deviation {deviation[column]:.3g}: float64 "
            f"cannot resolve margins on it (a deviation of at least {RESOLVED:g} of the mean is needed); subtract its mean, or "
            f"exclude the column"
        )
        raise ProbeError(msg)
    return np.where(varies, deviation, 0.0)
