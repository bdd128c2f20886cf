"""The modality gap: the distance between the means of two sets of rows."""

from __future__ import annotations

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.statistics import draws_interval
from probes.alignment.rows import unit


def modality_gap(x: np.ndarray, y: np.ndarray) -> float:
    """Return the distance between the means of unit-length rows [N, D] and [M, D] (Liang et al. 2022).

    Rows are not centered: the gap is what centering removes. It does not depend on which rows pair, so there is no
    permutation test of it.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> images, texts = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 3.0]])
    >>> round(alignment.modality_gap(images, texts), 4)
    1.4142
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        msg = f"the modality gap needs rows of equal width, got {list(x.shape)} and {list(y.shape)}"
        raise ProbeError(msg)
    return float(np.linalg.norm(unit(x).mean(axis=0) - unit(y).mean(axis=0)))


def gap_interval(
    a: np.ndarray, b: np.ndarray, image: np.ndarray, resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Return the bootstrap interval of the gap of paired unit rows [N, D], with whole images drawn (`image` [N])."""
    groups = int(image.max()) + 1
    difference = np.zeros((groups, a.shape[1]))
    np.add.at(difference, image, a - b)
    counts = np.bincount(image, minlength=groups)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    draws = np.linalg.norm(weights @ difference / (weights @ counts)[:, None], axis=1)
    low, high = centered_interval(draws, float(np.linalg.norm((a - b).mean(axis=0))), groups, confidence)
    return max(0.0, low), high


def centered_interval(draws: np.ndarray, value: float, groups: int, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of draws [B] that are moved to have the value as their mean.

    A distance grows with the noise of what it compares, and a draw with repeated groups is noisier than the data: draws of
    distances are biased upwards.
    """
    if not len(draws):
        return float("nan"), float("nan")
    low, high = draws_interval(draws - draws.mean() + value, value, groups, confidence)
    return float(low), float(high)
