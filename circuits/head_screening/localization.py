"""Localization heads: heads that attend to few compact regions of the image (Kang et al. 2025, arXiv 2503.06287)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def elbow(values: Float[np.ndarray, " n"]) -> float:
    """Return the value at the elbow of sorted values: the point farthest below the line from the largest to the smallest.

    Axes are scaled to 1 first. Heads above the elbow attend to the image clearly more than the majority. If the curve is
    never below the line, there is no elbow, and the result is less than all values.
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
    """Return the entropy of above-mean attention over connected regions, in nats; 0 for a single region.

    Regions are the connected components of ``relu(map - mean of map)``, with 8-neighborhood; with P the share of each
    region, the entropy is ``-sum P log P``.

    Parameters
    ----------
    maps
        Attention over the patches of an image, one map per head.
    """
    above = np.maximum(maps.astype(np.float64) - maps.mean(axis=(1, 2), keepdims=True, dtype=np.float64), 0)
    # Remove rounding errors of constant maps, which are not regions.
    above[above <= 1e-7 * np.abs(maps).max(axis=(1, 2), keepdims=True)] = 0
    label = components(above > 0).reshape(len(maps), -1)
    size = label.shape[1] + 1
    shares = np.bincount((label + size * np.arange(len(maps))[:, None]).ravel(), above.ravel(), size * len(maps))
    shares = shares.reshape(len(maps), size)
    total = shares.sum(axis=1, keepdims=True)
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    return np.maximum(0.0, -(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)).sum(axis=1))


def components(mask: Bool[np.ndarray, "n rows columns"]) -> np.ndarray:
    """Return the label of each patch's connected region (8-neighborhood), 0 outside; int, shaped as `mask`."""
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
    """Return 1 for the heads that an example selects, 0 for the others; the mean is the paper's selection frequency.

    Candidates are heads whose attention to the image, summed over patches and averaged over examples, is above the elbow.
    Each example selects the `keep` candidates of lowest spatial entropy; ties go to heads with more attention to the
    image.

    Parameters
    ----------
    maps
        Attention over patches; not renormalized.
    grid
        Rows and columns of patches.
    keep
        Number of heads that an example selects (10 in the paper).
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
