"""Cosine of paired rows, centered."""

from __future__ import annotations

import numpy as np

from probes.alignment.rows import center, check_pairs, unit


def row_cosines(x: np.ndarray, y: np.ndarray, *, centered: bool = True) -> np.ndarray:
    """Return the cosine of each pair of rows [N, D], float64 [N]; 0 for a row of length 0.

    Parameters
    ----------
    x, y
        Paired rows in a common space.
    centered
        Subtract each side's mean over the rows first. Without it, two modalities in different narrow cones have cosines far
        from 0 whatever the pairs.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> alignment.row_cosines(x, x[::-1] + 5)
    array([-1., -1.])
    """
    x, y = check_pairs(x, y, same_width=True)
    a, b = (unit(center(values) if centered else values) for values in (x, y))
    return (a * b).sum(axis=1)


def cosine(x: np.ndarray, y: np.ndarray, *, centered: bool = True) -> float:
    """Return the mean of `row_cosines`: unchanged by a shift, a positive scale, or one rotation of both sides.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(alignment.cosine(x, 3 * x + 1), 6)
    1.0
    """
    return float(row_cosines(x, y, centered=centered).mean())
