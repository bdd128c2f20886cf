"""Agreement of linear kernels: HSIC, CKA, and CKA of nearest neighbors (CKNNA)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count
from probes.alignment.neighbors import adjacency, check_k, find_neighbors
from probes.alignment.rows import CLAMP, NEIGHBORS, center, check_pairs, clamped_unit


def cka(x: np.ndarray, y: np.ndarray, *, unbiased: bool = True, batch: int | None = None, seed: int = 0) -> float:
    """Return linear centered kernel alignment of rows [N, D] and [N, E] (Kornblith et al. 2019).

    Parameters
    ----------
    unbiased
        Use the unbiased estimate of HSIC (Song et al. 2012), whose mean is 0 for independent rows. The biased estimate,
        ``tr(K H L H)``, increases with width: CKA of noise is about ``D / (D + N)``.
    batch
        Sum HSIC over batches of this size in random order: quadratic memory in the batch instead of in N (Nguyen et al. 2021).
    seed
        Order of the batches.

    Returns
    -------
    The unbiased estimate can be negative. NaN if a set of rows is constant.

    Raises
    ------
    ProbeError
        If there are fewer than 4 rows, or a batch has fewer.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> round(alignment.cka(x, 5 * x @ rotation), 6)
    1.0
    """
    x, y = check_pairs(x, y)
    size = len(x) if batch is None else min(batch, len(x))
    if size < 4:
        msg = f"CKA of {format_count(len(x), 'row')} in batches of {size}: at least 4 rows per batch are needed"
        raise ProbeError(msg)
    order = np.random.default_rng(seed).permutation(len(x)) if size < len(x) else np.arange(len(x))
    measure = hsic_unbiased if unbiased else hsic_biased
    total = np.zeros(3)
    # An incomplete last batch is skipped: its estimate would not be comparable.
    for start in range(0, len(x) - size + 1, size):
        part = order[start : start + size]
        k, l = gram(x[part]), gram(y[part])  # noqa: E741
        total += [measure(k, l), measure(k, k), measure(l, l)]
    return _normalized(total[0], total[1], total[2])


def gram(values: np.ndarray) -> np.ndarray:
    """Return the inner products [N, N] of centered rows."""
    values = center(values)
    return values @ values.T


def hsic_biased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Return ``tr(K H L H)`` of Gram matrices [N, N] (Gretton et al. 2005), not divided by ``(N - 1)^2``.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.array([[1.0], [-1.0]])
    >>> alignment.hsic_biased(x @ x.T, x @ x.T)
    4.0
    """
    centered = k - k.mean(axis=0) - k.mean(axis=1, keepdims=True) + k.mean()
    return float((centered * l).sum())


def hsic_unbiased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Return the unbiased estimate of HSIC of Gram matrices [N, N] (Song et al. 2012, equation 5).

    Its first term is ``sum_ij K_ij L_ji`` without the diagonal; the order of the indices matters for kernels that are not
    symmetric, as those of `cknna`.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(2, 400, 1))
    >>> abs(alignment.hsic_unbiased(x @ x.T, y @ y.T)) < 0.01
    True
    """
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    trace = float((k * l.T).sum())
    return _unbiased(n, trace, float(k.sum()) * float(l.sum()), float(k.sum(axis=0) @ l.sum(axis=1)))


def cknna(x: np.ndarray, y: np.ndarray, k: int = NEIGHBORS, clamp: float | None = CLAMP) -> float:
    """Return centered kernel nearest-neighbor alignment of rows [N, D] and [N, E] (Huh et al. 2024, arXiv 2405.07987).

    CKA with the unbiased HSIC, of kernels that are 0 except where row j is one of the k nearest neighbors of row i in both
    representations; for each kernel with itself, in that representation. Rows are clamped and scaled to unit length, and
    neighbors chosen, as for `mutual_knn`. As in the released code, except that nothing is added to the denominator (there
    1e-6).

    Returns
    -------
    NaN where a kernel has no positive HSIC with itself.

    Raises
    ------
    ProbeError
        If there are fewer than 4 rows, or k is less than 2 or not less than the number of rows.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> round(alignment.cknna(x, 5 * x @ rotation, clamp=None), 6)
    1.0
    """
    x, y = check_pairs(x, y)
    check_k(k, len(x))
    if k < 2 or len(x) < 4:
        msg = f"CKNNA with k={k} of {format_count(len(x), 'row')}: at least 2 neighbors and 4 rows are needed"
        raise ProbeError(msg)
    a, b = (NeighborKernel.of(clamped_unit(values, clamp), k) for values in (x, y))
    return join_neighbor_kernels(a, b)(np.arange(len(x)))


@dataclass(frozen=True, eq=False)
class NeighborKernel:
    """A kernel [N, N] and its entries of nearest neighbors."""

    kernel: np.ndarray
    near: np.ndarray
    """bool [N, N]: whether j is a neighbor of i."""
    i: np.ndarray
    """int64 [N k]: row of each neighbor's entry."""
    j: np.ndarray
    transposed: np.ndarray
    """int64 [N k]: position of the entry (j, i) in the list, or -1."""
    norm: float
    """HSIC of the kernel of neighbors with itself."""

    __repr__ = short_repr

    @classmethod
    def of(cls, unit_rows: np.ndarray, k: int) -> NeighborKernel:
        """Select the k nearest neighbors of rows of unit length."""
        near = find_neighbors(unit_rows, k)
        n = len(near)
        i, j = np.repeat(np.arange(n), k), near.ravel()
        place = np.full((n, n), -1, dtype=np.int64)
        place[i, j] = np.arange(len(i))
        transposed = place[j, i]
        kernel = unit_rows @ unit_rows.T
        norm = _hsic_of_entries(n, i, j, transposed, kernel[i, j], kernel[i, j])
        return cls(kernel, adjacency(near), i, j, transposed, norm)


def join_neighbor_kernels(a: NeighborKernel, b: NeighborKernel) -> Callable[[np.ndarray], float]:
    """Return the function from an order of b's rows [N] to CKNNA; its cost is that of N k entries."""

    def value(order: np.ndarray) -> float:
        i, j = order[a.i], order[a.j]
        mask = b.near[i, j]
        entries = np.where(mask, a.kernel[a.i, a.j], 0.0), np.where(mask, b.kernel[i, j], 0.0)
        return _normalized(_hsic_of_entries(len(order), a.i, a.j, a.transposed, *entries), a.norm, b.norm)

    return value


def join_grams(k: np.ndarray, l: np.ndarray, *, unbiased: bool = True) -> Callable[[np.ndarray], float]:  # noqa: E741
    """Return the function from an order of l's rows [N] to CKA; what does not depend on the order is computed once."""
    if not unbiased:
        centered = k - k.mean(axis=0) - k.mean(axis=1, keepdims=True) + k.mean()
        norms = hsic_biased(k, k), hsic_biased(l, l)
        return lambda order: _normalized(float(np.vdot(centered, l[np.ix_(order, order)])), *norms)
    n, norms = len(k), (hsic_unbiased(k, k), hsic_unbiased(l, l))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    sums, total = (k.sum(axis=0), l.sum(axis=1)), float(k.sum()) * float(l.sum())

    def value(order: np.ndarray) -> float:
        trace = float(np.vdot(k, l[np.ix_(order, order)]))  # both are symmetric
        return _normalized(_unbiased(n, trace, total, float(sums[0] @ sums[1][order])), *norms)

    return value


def _hsic_of_entries(
    n: int,
    i: np.ndarray,
    j: np.ndarray,
    transposed: np.ndarray,
    k: np.ndarray,
    l: np.ndarray,  # noqa: E741
) -> float:
    """Return the unbiased HSIC of two kernels with the same entries (i, j), whose values are k and l."""
    both = transposed >= 0
    trace = float(k[both] @ l[transposed[both]])
    cross = float(np.bincount(j, k, n) @ np.bincount(i, l, n))
    return _unbiased(n, trace, float(k.sum()) * float(l.sum()), cross)


def _unbiased(n: int, trace: float, sums: float, cross: float) -> float:
    return (trace + sums / ((n - 1) * (n - 2)) - 2.0 * cross / (n - 2)) / (n * (n - 3))


def _normalized(value: float, a: float, b: float) -> float:
    return float(value / math.sqrt(a * b)) if a > 0 and b > 0 else math.nan
