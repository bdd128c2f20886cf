"""Nearest neighbors that two representations have in common."""

from __future__ import annotations

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.text import format_count
from probes.alignment.rows import CLAMP, NEIGHBORS, check_pairs, clamped_unit


def find_neighbors(unit_rows: np.ndarray, k: int) -> np.ndarray:
    """Return the k other rows with the largest inner products, int64 [N, k]; of equal ones the lower index first."""
    similar = unit_rows @ unit_rows.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


def adjacency(near: np.ndarray) -> np.ndarray:
    """Return whether j is a neighbor of i, bool [N, N]."""
    out = np.zeros((len(near), len(near)), dtype=bool)
    out[np.arange(len(near))[:, None], near] = True
    return out


def check_k(k: int, n: int) -> None:
    """Raise `ProbeError` unless n rows have k neighbors each."""
    if not 1 <= k < n:
        msg = f"k={k} neighbors of {format_count(n, 'row')}: k must be at least 1 and less than the number of rows"
        raise ProbeError(msg)


def neighbor_overlap(x: np.ndarray, y: np.ndarray, k: int = NEIGHBORS, clamp: float | None = CLAMP) -> np.ndarray:
    """Return the share of its k nearest neighbors that each row has in both representations, float64 [N].

    Parameters and errors as for `mutual_knn`.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> alignment.neighbor_overlap(x, x).shape
    (50,)
    """
    x, y = check_pairs(x, y)
    check_k(k, len(x))
    near, other = (find_neighbors(clamped_unit(values, clamp), k) for values in (x, y))
    return np.take_along_axis(adjacency(other), near, axis=1).mean(axis=1)


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int = NEIGHBORS, clamp: float | None = CLAMP) -> float:
    """Return the mean share of k nearest neighbors that paired rows [N, D] and [N, E] have in common.

    As in the code of Huh et al. 2024 (arXiv 2405.07987): absolute values are clamped at the mean over rows of each row's
    `clamp` quantile (None: no clamping), rows are scaled to unit length but not centered, and neighbors are the other rows
    with the largest inner products. Of equal products the first row is nearer. The released code takes one limit for all
    layers of a model; here each array has its own.

    Raises
    ------
    ProbeError
        If k is less than 1, or not less than the number of rows.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> alignment.mutual_knn(x, x @ rotation, clamp=None)
    1.0
    """
    return float(neighbor_overlap(x, y, k, clamp).mean())
