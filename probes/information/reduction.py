"""Reduce every site to the same number of dimensions, inside each fold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import eigh

_LEAST = 1e-12
"""Eigenvalues below this share of the largest are rounding errors."""


@dataclass(frozen=True, eq=False)
class ReducedFold:
    """All rows of a site in the principal axes of the training rows of one fold."""

    values: np.ndarray
    """float64 [N, k], scaled by one number so that a training row has the mean squared norm k."""
    kept_variance: float
    """Share of the variance of the training rows in these axes."""


def reduce_folds(features: np.ndarray, outer: np.ndarray, k: int) -> list[ReducedFold]:
    """Return a site ``[N, D]`` in the first k principal axes of the training rows of each fold.

    The axes are not whitened: a small direction stays small, and a penalty suppresses it. The one number by which all are
    scaled makes penalties comparable between sites of different units.

    Parameters
    ----------
    features
        float [N, D], finite.
    outer
        int [N]: the fold in which a row is held out.
    k
        Largest number of axes; fewer where the site has fewer dimensions.

    Notes
    -----
    The second moments (or, for ``D > N``, the inner products of rows) are computed once; each fold takes its part of them.
    """
    x = np.asarray(features, dtype=np.float64)
    x = x - x.mean(axis=0)
    wide = x.shape[1] > x.shape[0]
    table = x @ x.T if wide else x.T @ x
    folds = [_reduce(table, x, outer != fold, k, wide=wide) for fold in range(int(outer.max()) + 1)]
    width = max(fold.values.shape[1] for fold in folds)
    # Rows of low rank may have one axis fewer in some folds; readers of all folds are trained together and need equal widths.
    return [replace(f, values=np.pad(f.values, ((0, 0), (0, width - f.values.shape[1])))) for f in folds]


def reduce_rows(features: np.ndarray, k: int) -> ReducedFold:
    """Return a site ``[N, D]`` in its first k principal axes, of all rows."""
    x = np.asarray(features, dtype=np.float64)
    x = x - x.mean(axis=0)
    wide = x.shape[1] > x.shape[0]
    return _reduce(x @ x.T if wide else x.T @ x, x, np.ones(len(x), dtype=bool), k, wide=wide)


def _reduce(table: np.ndarray, x: np.ndarray, train: np.ndarray, k: int, *, wide: bool) -> ReducedFold:
    values, total = _from_products(table, train, k) if wide else _from_moments(table, x, train, k)
    power = float((values[train] ** 2).sum(axis=1).mean())
    scale = np.sqrt(values.shape[1] / power) if power > 0 else 0.0
    return ReducedFold(values * scale, power * int(train.sum()) / total if total > 0 else 1.0)


def _from_moments(table: np.ndarray, x: np.ndarray, train: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Return the components of all rows and the total sum of squares of the training rows, from moments [D, D]."""
    test_rows, n = x[~train], int(train.sum())
    mean = -test_rows.sum(axis=0) / n  # the sum of all rows is 0
    scatter = table - test_rows.T @ test_rows - n * np.outer(mean, mean)
    values, axes = _largest(scatter, min(k, n - 1))
    del values
    return (x - mean) @ axes, float(np.trace(scatter))


def _from_products(table: np.ndarray, train: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Return the same from the inner products of rows [N, N]."""
    rows = table[:, train]
    rows = rows - rows.mean(axis=1, keepdims=True)  # centered at the training mean on the right
    rows = rows - rows[train].mean(axis=0)
    values, vectors = _largest(rows[train], min(k, int(train.sum()) - 1))
    return rows @ (vectors / np.sqrt(values)), float(np.trace(rows[train]))


def _largest(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest eigenvalues that are not rounding errors, and their vectors, the largest first."""
    n = len(matrix)
    values, vectors = eigh((matrix + matrix.T) / 2, subset_by_index=(max(0, n - k), n - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    valid = values > _LEAST * max(float(values[0]), np.finfo(float).tiny)
    valid[0] = True
    return np.maximum(values[valid], np.finfo(float).tiny), vectors[:, valid]
