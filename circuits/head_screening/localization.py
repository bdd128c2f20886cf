"""Heads whose attention lies on few compact spots of the image (Kang et al. 2025, arXiv 2503.06287)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def elbow(values: Float[np.ndarray, " n"]) -> float:
    """Return the value at the elbow of sorted values: the point farthest below the line from the largest to the smallest.

    Axes are scaled to 1 first. Heads above it attend to the image more than the many that hardly do. Where the curve
    never lies below the line there is no elbow, and what is returned lies below all values.
    """
    curve = np.sort(np.asarray(values, np.float64))[::-1]
    span = curve[0] - curve[-1]
    if len(curve) > 2 and span > 0:
        along = np.arange(len(curve)) / (len(curve) - 1)
        below = (1 - along) - (curve - curve[-1]) / span
        if below.max() > 0:
            return float(curve[int(np.argmax(below))])
    return float(curve[-1]) - 1.0


def spatial_entropy(maps: Float[np.ndarray, "n rows columns"]) -> Float[np.ndarray, " n"]:
    """Return how attention above its mean is spread over connected spots, in nats; 0 where there is one spot only.

    Of ``relu(map - mean of map)`` the connected components are taken, corners touching included; with P the share of
    each, the entropy is ``-sum P log P``.

    Parameters
    ----------
    maps
        Attention over the patches of an image, one map a head.
    """
    above = np.maximum(maps.astype(np.float64) - maps.mean(axis=(1, 2), keepdims=True, dtype=np.float64), 0)
    # A map without any spot has rounding left over, which is no spot.
    above[above <= 1e-7 * np.abs(maps).max(axis=(1, 2), keepdims=True)] = 0
    label = components(above > 0).reshape(len(maps), -1)
    size = label.shape[1] + 1
    shares = np.bincount((label + size * np.arange(len(maps))[:, None]).ravel(), above.ravel(), size * len(maps))
    shares = shares.reshape(len(maps), size)
    total = shares.sum(axis=1, keepdims=True)
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    return np.maximum(0.0, -(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)).sum(axis=1))


def components(mask: Bool[np.ndarray, "n rows columns"]) -> np.ndarray:
    """Return for each patch the number of its spot, corners touching included, 0 outside; int, shaped as `mask`."""
    rows, columns = mask.shape[1:]
    label = np.where(mask, np.arange(1, rows * columns + 1).reshape(rows, columns), 0)
    while True:
        padded = np.pad(label, ((0, 0), (1, 1), (1, 1)))
        near = np.max([padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=0)
        spread = np.where(mask, near, 0)
        if np.array_equal(spread, label):
            return label
        label = spread


def selected(
    maps: Float[np.ndarray, "n heads patches"], grid: tuple[int, int], keep: int
) -> Float[np.ndarray, "n heads"]:
    """Return 1 for the heads that an example selects, 0 for the others; their mean is the paper's selection frequency.

    Of the heads whose attention to the image, summed over patches and averaged over examples, is above the elbow, each
    example selects the `keep` of lowest spatial entropy; of equal ones the one that attends to the image more.

    Parameters
    ----------
    maps
        Attention over patches; not renormalised.
    grid
        Rows and columns of patches.
    keep
        How many heads an example selects (10 in the paper).
    """
    mass = maps.sum(axis=-1, dtype=np.float64)  # [n, heads]
    overall = mass.mean(axis=0)
    candidates = np.flatnonzero(overall > elbow(overall))
    out = np.zeros(maps.shape[:2], np.float32)
    for row, example in enumerate(maps):
        entropy = spatial_entropy(example[candidates].reshape(-1, *grid))
        best = np.lexsort((-mass[row, candidates], np.round(entropy, 9)))[:keep]
        out[row, candidates[best]] = 1
    return out
