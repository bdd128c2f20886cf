"""Ridge probes on thousands of labellings at once: one factorisation a fold, a few matrix products for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 1000
"""Columns of labels multiplied at once: few enough for the processor's cache."""


@dataclass(frozen=True)
class Targets:
    """Columns of -1/+1 labels, rows dealt to folds; made once for all layers and heads."""

    fold: np.ndarray
    """[n]: -1 for held-out rows."""
    parts: tuple[np.ndarray, ...]
    """float32 [n_f, M] for each fold."""
    sums: np.ndarray
    """float32 [F, M]: of each fold."""
    tested: np.ndarray
    """float32 [n_test, M]."""

    @classmethod
    def of(cls, values: np.ndarray, fold: np.ndarray) -> Targets:
        """Deal targets float32 [n, M] by fold [n]; every column has both classes in training and in testing."""
        parts = tuple(np.ascontiguousarray(values[fold == f]) for f in np.unique(fold[fold >= 0]))
        return cls(fold, parts, np.stack([p.sum(axis=0) for p in parts]), np.ascontiguousarray(values[fold < 0]))


def ridge_scores(features: np.ndarray, targets: Targets, penalties: np.ndarray) -> np.ndarray:
    """Return held-out balanced accuracies of ridge probes, one for each column of targets.

    Standardised inside folds; C is the one with the least squared error on the rows left out, between equals the first;
    the threshold lies midway between the projected class means, and a margin of exactly 0 counts half.

    Parameters
    ----------
    features
        [n, D].
    targets
        Of the same n rows.
    penalties
        C, increasing.

    Returns
    -------
    float32 [M].
    """
    fold = targets.fold
    order = np.concatenate([np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])])
    x = features[order].astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation[deviation <= 1e-7 * np.abs(mean)] = np.inf
    standard = ((x - mean) / deviation).astype(np.float32)
    ends = np.cumsum([0, *(len(p) for p in targets.parts)])
    spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
    folds = [_Fold.of(standard, span) for span in spans]
    whole = _Fold.of(standard, slice(0, 0))
    on_axes = ((features[fold < 0] - mean) / deviation).astype(np.float32) @ whole.left
    shrink = 1 / (whole.values + 1 / penalties[:, None])  # [R, r]
    n, n_columns = len(standard), targets.sums.shape[1]
    wide = standard.shape[1] > n
    result = np.empty(n_columns, np.float32)
    for start in range(0, n_columns, CHUNK):
        columns = slice(start, min(start + CHUNK, n_columns))
        parts, sums = [p[:, columns] for p in targets.parts], targets.sums[:, columns]
        # X't of each fold's rows, on the features, or where those are many on the axes of all rows.
        table = whole.rows if wide else standard
        own = [table[span].T @ part for span, part in zip(spans, parts, strict=True)]
        total = np.sum(own, axis=0)
        loss = np.zeros((len(penalties), total.shape[1]), np.float32)
        for at, f in enumerate(folds):
            if wide:
                f.add_loss_by_rows(loss, at, parts, sums, penalties)
            else:
                f.add_loss(loss, total - own[at], own[at], sums.sum(axis=0) - sums[at], sums[at], penalties)
        best = np.argmin(loss, axis=0)
        pull = total if wide else whole.left.T @ total  # [r, m]
        weights = pull * shrink[best].T
        # The class means project to pull.weights / 2n with either sign: the threshold is midway.
        high = 0.5 * (n + sums.sum(axis=0))
        middle = 0.25 * (1 / high - 1 / (n - high)) * (pull * weights).sum(axis=0)
        margins = on_axes @ weights
        margins -= middle
        result[columns] = _balanced(margins, targets.tested[:, columns])
    return result


@dataclass(frozen=True)
class _Fold:
    """The rows left out of a fold and the others, standardised on those and turned to their principal axes."""

    span: slice
    """Rows left out."""
    n_others: int
    values: np.ndarray
    """float32 [r]: eigenvalues of ``X'X`` of the others."""
    left: np.ndarray
    """float32 [D, r]: from standardised features to the axes, this fold's scaling included."""
    offset: np.ndarray
    """float32 [r]: where the others' mean lies on the axes."""
    square: np.ndarray
    """float32 [r, r]: ``X'X`` of the rows left out, on the axes."""
    rows: np.ndarray
    """float32 [n, r]: all rows on the axes, centred on the others."""

    @classmethod
    def of(cls, standard: np.ndarray, span: slice) -> _Fold:
        others = np.delete(standard, span, axis=0) if span.stop > span.start else standard
        mean, deviation = others.mean(axis=0, dtype=np.float64), others.std(axis=0, dtype=np.float64)
        deviation[deviation <= 1e-6] = np.inf
        x = ((others - mean) / deviation).astype(np.float32)
        wide = x.shape[1] > x.shape[0]
        values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
        kept = values > 1e-6 * max(float(values[-1]), 1e-30)
        values, vectors = values[kept], vectors[:, kept]
        axes = (x.T @ vectors) / np.sqrt(values) if wide else vectors
        left = (axes / deviation[:, None]).astype(np.float32)
        offset = (mean @ left).astype(np.float32)
        rows = standard @ left - offset
        square = np.empty((0, 0), np.float32) if wide else rows[span].T @ rows[span]
        return cls(span, len(others), values, left, offset, square, rows)

    def add_loss(
        self,
        loss: np.ndarray,
        others: np.ndarray,
        own: np.ndarray,
        others_sum: np.ndarray,
        own_sum: np.ndarray,
        penalties: np.ndarray,
    ) -> None:
        """Add the squared error of the rows left out to loss [R, m], up to what is the same for all penalties.

        `others`, `own` are ``X't`` [D, m] of standardised features, and the sums of targets [m].
        """
        mean = others_sum / self.n_others
        pull = self.left.T @ others
        pull -= self.offset[:, None] * others_sum
        match = self.left.T @ own
        match -= self.offset[:, None] * own_sum
        match -= self.rows[self.span].sum(axis=0)[:, None] * mean
        match *= 2
        weights, image = np.empty_like(pull), np.empty_like(pull)
        for at, c in enumerate(penalties):
            np.multiply(pull, (1 / (self.values + 1 / c))[:, None], out=weights)
            np.matmul(self.square, weights, out=image)
            image -= match
            image *= weights
            loss[at] += image.sum(axis=0)

    def add_loss_by_rows(
        self, loss: np.ndarray, number: int, parts: Sequence[np.ndarray], sums: np.ndarray, penalties: np.ndarray
    ) -> None:
        """Do the same row by row, for more axes than rows are left out: parts [n_f, m] and their sums [F, m]."""
        others_sum = sums.sum(axis=0) - sums[number]
        inner = np.delete(self.rows, self.span, axis=0)
        pull = inner.T @ np.concatenate([p for at, p in enumerate(parts) if at != number])
        wanted = parts[number] - others_sum / self.n_others
        rows = self.rows[self.span]
        for at, c in enumerate(penalties):
            error = rows @ (pull * (1 / (self.values + 1 / c))[:, None])
            error -= wanted
            error *= error
            loss[at] += error.sum(axis=0)


def _balanced(margins: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Balanced accuracy of each column: margins (overwritten) and targets (-1, +1) float32 [n, m]."""
    n, high = len(targets), 0.5 * (len(targets) + targets.sum(axis=0))
    np.sign(margins, out=margins)
    signs = margins.sum(axis=0)
    margins *= targets
    agreement = margins.sum(axis=0)
    # Right minus wrong, of both classes together and of their difference.
    up, down = 0.5 * (agreement + signs), 0.5 * (agreement - signs)
    return 0.5 + 0.25 * (up / high + down / (n - high))
