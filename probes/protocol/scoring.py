"""Scores of binary predictions, and intervals that account for dependence within groups."""

from __future__ import annotations

import numpy as np

from groundscope.core.intervals import combined_interval, share_interval

_BLOCK_ELEMENTS = 4_000_000


def balanced_accuracy(labels: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Return the mean of the two classes' recalls; a positive margin predicts class 1.

    Parameters
    ----------
    labels
        [N] in 0, 1.
    margins
        [..., N].

    Returns
    -------
    float64 [...]; NaN if a class is absent.
    """
    predicted = np.asarray(margins) > 0
    truth = np.asarray(labels) == 1
    n_positive = int(truth.sum())
    if n_positive in {0, len(truth)}:
        return np.full(predicted.shape[:-1], np.nan)
    return 0.5 * (predicted[..., truth].mean(axis=-1) + (~predicted[..., ~truth]).mean(axis=-1))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve of scores [N] for labels [N] in 0, 1 (ties count half); NaN if a class is absent."""
    return float(weighted_auc(labels, scores, np.ones((1, len(labels))))[0])


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve per row of weights: labels [N], scores [N], weights [B, N] -> float64 [B].

    The weighted Mann-Whitney statistic, with ties counting half; NaN if a class has no weight.
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
        # Sums in float64 for any dtype of the weights: products of counts exceed the precision of float32.
        wins = np.einsum("bt,bt->b", up, below, dtype=np.float64)
        pairs = up.sum(axis=1, dtype=np.float64) * down.sum(axis=1, dtype=np.float64)
        result[begin : begin + step] = np.divide(wins, pairs, out=np.full(len(w), np.nan), where=pairs > 0)
    return result


def resample_groups(groups: np.ndarray, resamples: int, seed: int | list[int]) -> np.ndarray:
    """Draw groups with replacement; return the count of each row [N] in each resample, float32 [B, N].

    The cluster bootstrap (Davison and Hinkley 1997, section 3.8): each resample draws as many whole groups as the data has.
    """
    names, of_row = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(names), size=(resamples, len(names)))
    draws += np.arange(resamples)[:, None] * len(names)  # separate number ranges per resample, for one bincount
    counts = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
    return counts.astype(np.float32)[:, of_row]


def class_totals(
    labels: np.ndarray, margins: np.ndarray, groups: np.ndarray, n_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count per group and class the correctly predicted rows, and all rows.

    Parameters
    ----------
    labels
        0 or 1, [N], or [M, N] with separate labels per row of margins.
    margins
        [M, N]: positive predicts 1.
    groups
        int [N]: number of the group of each column.
    n_groups
        Number of groups G.

    Returns
    -------
    Two arrays float64 [2, M, G], class 1 first: the recalls' numerators and denominators.
    """
    truth = np.broadcast_to(labels, margins.shape)
    tables = np.empty((2, 2, len(margins), n_groups))
    for at, value in enumerate((1, 0)):
        of_class = truth == value
        for k, table in enumerate((of_class & ((margins > 0) == (value == 1)), of_class)):
            tables[k, at] = [np.bincount(groups, row, minlength=n_groups) for row in table]
    return tables[0], tables[1]


def balanced_accuracy_interval(
    labels: np.ndarray, margins: np.ndarray, groups: np.ndarray, n_groups: int, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return intervals of balanced accuracies as means of two rates (`groundscope.core.intervals.combined_interval`).

    Parameters
    ----------
    labels, margins, groups, n_groups
        As for `class_totals`.
    confidence
        Nominal coverage.

    Returns
    -------
    Low and high ends float64 [M]; NaN if a class is absent.
    """
    hits, trials = class_totals(labels, margins, groups, n_groups)
    return combined_interval(hits, trials, (0.5, 0.5), confidence)


def difference_interval(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return intervals of the difference of balanced accuracies, first minus second, from their `class_totals`.

    For scores of the same examples, both have the same groups and are paired; for different examples, each has separate
    groups and 0 rows in the groups of the other.
    """
    hits, trials = (np.concatenate(both) for both in zip(first, second, strict=True))
    return combined_interval(hits, trials, (0.5, 0.5, -0.5, -0.5), confidence)


def auc_interval(
    labels: np.ndarray,
    values: np.ndarray,
    draws: np.ndarray,
    groups: np.ndarray,
    n_groups: int,
    confidence: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Return intervals of areas under ROC curves from draws of whole groups (`groundscope.core.intervals.share_interval`).

    The effective number of trials is at most ``4 / (1 / n_1 + 1 / n_0)``, with n the number of rows per class; if all draws
    are equal, n is the number of groups with rows of the class, because the variation within groups is then unknown.

    Parameters
    ----------
    labels
        0 or 1, [N] or [M, N].
    values
        [M]: the areas.
    draws
        [B, M]: from `bootstrap_auc`.
    groups, n_groups
        As for `class_totals`.
    confidence
        Nominal coverage.

    Returns
    -------
    Low and high ends float64 [M]; NaN if a class is absent.
    """
    truth = np.atleast_2d(labels)
    rows = np.stack([(truth == 1).sum(axis=1), (truth == 0).sum(axis=1)]).astype(np.float64)  # [2, M]
    of_class = np.array([[len(np.unique(groups[row == value])) for row in truth] for value in (1, 0)], dtype=np.float64)
    defined = ~np.isnan(draws).all(axis=0) & ~np.isnan(values)
    variance = np.zeros(len(values))
    variance[defined] = np.nanvar(draws[:, defined], axis=0)
    counted = np.where(variance > 0, rows, of_class)
    trials = 4 / (1 / np.maximum(counted, 1)).sum(axis=0)
    low, high = share_interval(np.nan_to_num(values), variance, trials, of_class.min(axis=0), confidence)
    return np.where(defined, low, np.nan), np.where(defined, high, np.nan)


def bootstrap_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve in each resample of whole groups: equals `weighted_auc`, at the cost of group pairs.

    Parameters
    ----------
    labels, scores
        [M, N], or [N]: 0 or 1, and any numbers.
    groups
        int [N]: number of the group of each column.
    counts
        [B, G]: count of each group in each resample.

    Returns
    -------
    float64 [B, M], or [B]; NaN if a class is absent.
    """
    s, truth = np.atleast_2d(scores), np.atleast_2d(np.asarray(labels) == 1)
    n_cells, n_groups = len(s), counts.shape[1]
    truth = np.broadcast_to(truth, s.shape)
    by_group = np.argsort(groups, kind="stable")
    w = np.asarray(counts, dtype=np.float32)
    members = np.zeros((2, n_groups, n_cells), np.float32)
    result = np.full((len(w), n_cells), np.nan)
    step = max(1, _BLOCK_ELEMENTS // (max(len(w), n_groups) * n_groups))
    for begin in range(0, n_cells, step):
        cells = range(begin, min(begin + step, n_cells))
        wins = np.zeros(
            (n_groups, len(cells), n_groups), np.float32
        )  # wins of positives over negatives by pair of groups
        for at, k in enumerate(cells):
            up, down = by_group[truth[k, by_group]], np.flatnonzero(~truth[k])
            members[0, :, k], members[1, :, k] = (np.bincount(groups[p], minlength=n_groups) for p in (up, down))
            if not len(up) or not len(down):
                continue
            down = down[np.argsort(s[k, down])]
            # Row i: number of the lowest i negatives in each group; ties count half.
            below = np.zeros((len(down) + 1, n_groups), np.float32)
            below[np.arange(1, len(down) + 1), groups[down]] = 1
            np.cumsum(below, axis=0, out=below)
            lower, upper = (np.searchsorted(s[k, down], s[k, up], side=side) for side in ("left", "right"))
            above = below[lower] + below[upper]
            starts = np.flatnonzero(np.diff(groups[up], prepend=-1))
            wins[groups[up[starts]], at] = 0.5 * np.add.reduceat(above, starts, axis=0)
        won = (w @ wins.reshape(n_groups, -1)).reshape(len(w), len(cells), n_groups)
        result[:, cells.start : cells.stop] = np.einsum("bkg,bg->bk", won, w)
    possible = (w @ members[0]).astype(np.float64) * (w @ members[1])
    np.divide(result, possible, out=result, where=possible > 0)
    result[possible <= 0] = np.nan
    return result if np.ndim(scores) == 2 else result[:, 0]


def log_loss(labels: np.ndarray, margins: np.ndarray) -> float:
    """Return the mean log-loss in nats of margins [N] as log-odds, with balanced classes; chance is ln 2.

    NaN if a class is absent.
    """
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any():
        return float("nan")
    loss = np.logaddexp(0.0, np.where(truth, -1.0, 1.0) * margins)
    return 0.5 * float(loss[truth].mean() + loss[~truth].mean())


def calibration_error(labels: np.ndarray, margins: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error (Naeini et al. 2015) of margins [N] as log-odds.

    The mean distance between predicted probability and share of positives over `bins` equal bins of probability, with
    balanced classes; NaN if a class is absent.
    """
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any():
        return float("nan")
    weight = np.where(truth, 0.5 / truth.sum(), 0.5 / (~truth).sum())
    predicted = 0.5 * (1 + np.tanh(0.5 * np.asarray(margins, dtype=np.float64)))
    of_bin = np.minimum((predicted * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(of_bin, weight * (predicted - truth), minlength=bins)).sum())


def log_odds_slope(labels: np.ndarray, margins: np.ndarray) -> float:
    """Return the positive slope that scales margins [N] to the best log-odds, with balanced classes.

    Platt scaling without an offset, which changes no decision: Newton's method on the log of the slope.
    """
    truth = np.asarray(labels) == 1
    weight = np.where(truth, 0.5 / max(1, truth.sum()), 0.5 / max(1, (~truth).sum()))
    m = np.where(truth, 1.0, -1.0) * margins
    spread = float(np.sqrt((weight * m * m).sum()))
    if spread == 0:
        return 1.0
    m = m / spread
    at = 0.0
    for _ in range(50):
        slope = np.exp(at)
        wrong = 0.5 * (1 - np.tanh(0.5 * slope * m))
        first = -slope * float((weight * m * wrong).sum())
        second = first + slope**2 * float((weight * m * m * wrong * (1 - wrong)).sum())
        step = float(np.clip(-first / second if second > 0 else -np.sign(first), -1.0, 1.0))
        at = float(
            np.clip(at + step, -7.0, 7.0)
        )  # uninformative or perfectly separating margins have no finite best slope
        if abs(step) < 1e-8:
            break
    return float(np.exp(at)) / spread
