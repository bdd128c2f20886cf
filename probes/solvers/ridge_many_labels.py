"""Ridge probes for thousands of label vectors: one factorization per fold, and a few matrix products for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.threads import MapFunction
from probes.solvers.allocator import keep_freed_memory
from probes.solvers.constant_columns import column_scales

CHUNK = 1000
"""Columns of labels per matrix product, small enough for the processor's cache."""


@dataclass(frozen=True)
class Block:
    """Up to `CHUNK` columns of targets in contiguous arrays: strided access would cost more than the products."""

    parts: tuple[np.ndarray, ...]
    """float32 [n_f, m] for each fold."""
    tested: np.ndarray
    """float32 [n_test, m]."""


@dataclass(frozen=True)
class Targets:
    """Columns of -1/+1 labels, with rows divided into folds; computed once for all layers and heads."""

    fold: np.ndarray
    """[n]: -1 for held-out rows."""
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, values: np.ndarray, fold: np.ndarray) -> Targets:
        """Divide targets float32 [n, M] by fold [n]; every column has both classes in training and held-out rows."""
        rows = [np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])]
        held_out = np.flatnonzero(fold < 0)
        blocks = []
        for start in range(0, values.shape[1], CHUNK):
            columns = values[:, start : start + CHUNK]
            blocks.append(Block(tuple(columns[r] for r in rows), columns[held_out]))
        return cls(fold, tuple(blocks))


def ridge_scores(features: np.ndarray, targets: Targets, C: np.ndarray, each: MapFunction = map) -> np.ndarray:
    """Return held-out balanced accuracies of ridge probes, one per column of targets.

    Features are standardized within folds; C has the lowest cross-validated squared error, the first if equal; the threshold
    is midway between the projected class means, and a margin of exactly 0 counts half.

    Parameters
    ----------
    features
        [n, D].
    targets
        Targets of the same n rows.
    C
        Candidate inverse penalties, increasing.
    each
        The `map` over folds and blocks of columns: `groundscope.core.threads.map_in_threads`.

    Returns
    -------
    float32 [M].
    """
    keep_freed_memory()
    fold = targets.fold
    order = np.concatenate([np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])])
    x = features[order].astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation = column_scales(mean, deviation, len(x))
    deviation[deviation == 0] = np.inf
    standard = ((x - mean) / deviation).astype(np.float32)
    ends = np.cumsum([0, *(len(p) for p in targets.blocks[0].parts)])
    spans = [slice(a, b) for a, b in itertools.pairwise(ends)]
    whole, *folds = each(lambda span: _Fold.of(standard, span), [slice(0, 0), *spans])
    on_axes = ((features[fold < 0] - mean) / deviation).astype(np.float32) @ whole.projection
    shrink = 1 / (whole.values + 1 / C[:, None])  # [R, r]
    n = len(standard)
    wide = standard.shape[1] > n
    # For X't of each fold's rows and their sums: on the features, or for many features on the axes of all rows.
    table = np.column_stack([whole.rows if wide else standard, np.ones(n, np.float32)])
    forms = [None if wide else f.forms(C) for f in folds]

    def score_block(block: Block) -> np.ndarray:
        by_fold = np.stack([table[span].T @ part for span, part in zip(spans, block.parts, strict=True)])
        total = by_fold.sum(axis=0)
        loss = np.zeros((len(C), total.shape[1]), np.float32)
        for at, (f, form) in enumerate(zip(folds, forms, strict=True)):
            if form is None:
                f.add_loss_by_rows(loss, at, block.parts, by_fold[:, -1], C)
            else:
                f.add_loss(loss, total - by_fold[at], by_fold[at], form)
        best = np.argmin(loss, axis=0)
        correlation = total[:-1] if wide else whole.projection.T @ total[:-1]  # [r, m]
        weights = correlation * shrink[best].T
        # The class means project to correlation.weights / 2n with either sign: the threshold is midway.
        high = 0.5 * (n + total[-1])
        middle = 0.25 * (1 / high - 1 / (n - high)) * np.einsum("rm,rm->m", correlation, weights)
        margins = on_axes @ weights
        margins -= middle
        return _balanced(margins, block.tested)

    return np.concatenate(list(each(score_block, targets.blocks)))


@dataclass(frozen=True)
class _Fold:
    """The left-out rows of a fold and the other rows, standardized on the other rows and rotated to their principal axes."""

    span: slice
    """The left-out rows."""
    n_others: int
    values: np.ndarray
    """float32 [r]: eigenvalues of ``X'X`` of the other rows."""
    projection: np.ndarray
    """float32 [D, r]: maps standardized features to the axes, including this fold's scaling."""
    offset: np.ndarray
    """float32 [r]: mean of the other rows on the axes."""
    square: np.ndarray
    """float32 [r, r]: ``X'X`` of the left-out rows, on the axes."""
    rows: np.ndarray
    """float32 [n, r]: all rows on the axes, centered at the mean of the other rows."""

    @classmethod
    def of(cls, standard: np.ndarray, span: slice) -> _Fold:
        others = np.delete(standard, span, axis=0) if span.stop > span.start else standard
        mean, deviation = others.mean(axis=0, dtype=np.float64), others.std(axis=0, dtype=np.float64)
        deviation[deviation <= 1e-6] = np.inf
        x = ((others - mean) / deviation).astype(np.float32)
        wide = x.shape[1] > x.shape[0]
        values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
        nonzero = values > 1e-6 * max(float(values[-1]), 1e-30)
        values, vectors = values[nonzero], vectors[:, nonzero]
        axes = (x.T @ vectors) / np.sqrt(values) if wide else vectors
        projection = (axes / deviation[:, None]).astype(np.float32)
        offset = (mean @ projection).astype(np.float32)
        rows = standard @ projection - offset
        # The same choice as in `ridge_scores`: a fold can have fewer other rows than features where all rows are more.
        by_rows = standard.shape[1] > len(standard)
        square = np.empty((0, 0), np.float32) if by_rows else rows[span].T @ rows[span]
        return cls(span, len(others), values, projection, offset, square, rows)

    def forms(self, C: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the factors of the squared error of the left-out rows.

        With p and q [r], X't on the axes of the other rows and of the left-out rows, it is ``p'Ap - d'(p * q)`` per value of C.
        A is symmetric and returned in two parts: its first h columns, float32 [R, r, h], with the rows below h doubled, and
        the lower right block [R, r - h, r - h]; then d [R, r]; and the map from features and sums to the axes [r, D + 1].
        """
        shrink = (1 / (self.values + 1 / C[:, None])).astype(np.float32)
        a = shrink[:, :, None] * self.square * shrink[:, None, :]
        half = a.shape[1] // 2
        first, second = a[:, :, :half].copy(), a[:, half:, half:].copy()
        first[:, half:] *= 2
        return first, second, 2 * shrink, np.column_stack([self.projection.T, -self.offset])

    def add_loss(self, loss: np.ndarray, others: np.ndarray, own: np.ndarray, forms: tuple[np.ndarray, ...]) -> None:
        """Add the squared error of the left-out rows to loss [R, m], up to a constant that all values of C share.

        `others` and `own` are ``X't`` [D + 1, m] of the other rows and of the left-out rows, with standardized features and a
        column of ones.
        """
        first, second, linear, to_axes = forms
        p, product = to_axes @ others, to_axes @ own
        product -= np.multiply.outer(self.rows[self.span].sum(axis=0) / self.n_others, others[-1])
        product *= p
        loss -= linear @ product
        half = first.shape[2]
        image, upper, lower = product, p[:half], p[half:]  # reuses the memory of `product`
        for at in range(len(loss)):
            np.matmul(first[at], upper, out=image)
            loss[at] += np.einsum("rm,rm->m", image, p)
            np.matmul(second[at], lower, out=image[half:])
            loss[at] += np.einsum("rm,rm->m", image[half:], lower)

    def add_loss_by_rows(
        self, loss: np.ndarray, number: int, parts: Sequence[np.ndarray], sums: np.ndarray, C: np.ndarray
    ) -> None:
        """Like `add_loss`, computed row by row, for more axes than left-out rows: parts [n_f, m] and their sums [F, m]."""
        others_sum = sums.sum(axis=0) - sums[number]
        inner = np.delete(self.rows, self.span, axis=0)
        correlation = inner.T @ np.concatenate([p for at, p in enumerate(parts) if at != number])
        target = parts[number] - others_sum / self.n_others
        rows = self.rows[self.span]
        for at, c in enumerate(C):
            error = rows @ (correlation * (1 / (self.values + 1 / c))[:, None])
            error -= target
            error *= error
            loss[at] += error.sum(axis=0)


def _balanced(margins: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the balanced accuracy of each column: margins (overwritten) and targets (-1, +1) float32 [n, m]."""
    n, high = len(targets), 0.5 * (len(targets) + targets.sum(axis=0))
    margins[...] = (margins > 0).view(np.int8) - (margins < 0).view(np.int8)  # five times as fast as numpy's sign
    signs = margins.sum(axis=0)
    margins *= targets
    agreement = margins.sum(axis=0)
    # Correct minus incorrect predictions, as sum and difference of both classes.
    up, down = 0.5 * (agreement + signs), 0.5 * (agreement - signs)
    return 0.5 + 0.25 * (up / high + down / (n - high))
