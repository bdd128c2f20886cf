"""Scores of binary predictions, and intervals that know that rows of one group are not independent."""

from __future__ import annotations

import numpy as np

_BLOCK_ELEMENTS = 4_000_000


def balanced_accuracy(labels: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Mean of the two classes' recalls where a positive margin means class 1.

    Parameters
    ----------
    labels
        [N] in 0, 1.
    margins
        [..., N].

    Returns
    -------
    float64 [...]; NaN where a class is absent.
    """
    said = np.asarray(margins) > 0
    truth = np.asarray(labels) == 1
    n_positive = int(truth.sum())
    if n_positive in {0, len(truth)}:
        return np.full(said.shape[:-1], np.nan)
    return 0.5 * (said[..., truth].mean(axis=-1) + (~said[..., ~truth]).mean(axis=-1))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of scores [N] for labels [N] in 0, 1 (ties count half); NaN where a class is absent."""
    return float(weighted_auc(labels, scores, np.ones((1, len(labels))))[0])


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of weights: labels [N], scores [N], weights [B, N] -> float64 [B].

    The weighted Mann-Whitney statistic, ties counting half; NaN where a class has no weight.
    """
    order = np.argsort(scores, kind="stable")
    ranked = np.asarray(scores)[order]
    positive = (np.asarray(labels) == 1)[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    result = np.empty(len(weights))
    step = max(1, _BLOCK_ELEMENTS // max(1, len(order)))
    for begin in range(0, len(weights), step):
        w = weights[begin : begin + step, order]
        up, down = w * positive, w * ~positive
        if len(starts) < len(order):
            up, down = np.add.reduceat(up, starts, axis=1), np.add.reduceat(down, starts, axis=1)
        below = np.cumsum(down, axis=1)
        below -= 0.5 * down
        # Sums in float64 whatever the weights are in: products of counts outgrow float32.
        wins = np.einsum("bt,bt->b", up, below, dtype=np.float64)
        pairs = up.sum(axis=1, dtype=np.float64) * down.sum(axis=1, dtype=np.float64)
        result[begin : begin + step] = np.divide(wins, pairs, out=np.full(len(w), np.nan), where=pairs > 0)
    return result


def resample_groups(groups: np.ndarray, resamples: int, seed: int | list[int]) -> np.ndarray:
    """Draw groups with replacement; returns how often each row [N] occurs in each resample, float32 [B, N].

    The cluster bootstrap (Davison and Hinkley 1997, section 3.8): as many groups as there are, whole.
    """
    names, of_row = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(names), size=(resamples, len(names)))
    drawn += np.arange(resamples)[:, None] * len(names)  # one range of numbers for each resample, counted at once
    counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return counts.astype(np.float32)[:, of_row]


def bootstrap_balanced_accuracy(labels: np.ndarray, margins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Balanced accuracy of margins [M, N] in each resample of weights [B, N]: float64 [B, M], NaN without both classes."""
    truth = np.asarray(labels) == 1
    correct = ((margins > 0) == truth).astype(weights.dtype)
    recalls = []
    for mask in (truth, ~truth):
        total = weights[:, mask].sum(axis=1, dtype=np.float64)[:, None]
        hits = (weights[:, mask] @ correct[:, mask].T).astype(np.float64)
        recalls.append(np.divide(hits, total, out=np.full(hits.shape, np.nan), where=total > 0))
    return 0.5 * (recalls[0] + recalls[1])


def percentile_interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the central `confidence` share of draws [B, ...] as (low, high) [...]; undefined draws (NaN) are left out."""
    tail = (1 - confidence) / 2
    defined = ~np.isnan(draws).all(axis=0)
    low, high = np.full(defined.shape, np.nan), np.full(defined.shape, np.nan)
    if defined.any():
        low[defined], high[defined] = np.nanquantile(draws[:, defined], [tail, 1 - tail], axis=0)
    return low, high
