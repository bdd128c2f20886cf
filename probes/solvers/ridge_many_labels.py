"""Ridge probes on thousands of labellings at once: one factorisation a fold, a few matrix products for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probes.solvers.columns import column_scales
from probes.solvers.threads import Each, keep_freed_memory

CHUNK = 1000
"""Columns of labels multiplied at once: few enough for the processor's cache."""


@dataclass(frozen=True)
class Block:
    """Up to `CHUNK` columns of targets, each array by itself in memory: rows far apart cost more than their product."""

    parts: tuple[np.ndarray, ...]
    """float32 [n_f, m] for each fold."""
    tested: np.ndarray
    """float32 [n_test, m]."""


@dataclass(frozen=True)
class Targets:
    """Columns of -1/+1 labels, rows dealt to folds; made once for all layers and heads."""

    fold: np.ndarray
    """[n]: -1 for held-out rows."""
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, values: np.ndarray, fold: np.ndarray) -> Targets:
        """Deal targets float32 [n, M] by fold [n]; every column has both classes in training and in testing."""
        rows = [np.flatnonzero(fold == f) for f in np.unique(fold[fold >= 0])]
        held = np.flatnonzero(fold < 0)
        blocks = []
        for start in range(0, values.shape[1], CHUNK):
            columns = values[:, start : start + CHUNK]
            blocks.append(Block(tuple(columns[r] for r in rows), columns[held]))
        return cls(fold, tuple(blocks))


def ridge_scores(features: np.ndarray, targets: Targets, penalties: np.ndarray, each: Each = map) -> np.ndarray:
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
    each
        How folds and blocks of columns are gone through: `probes.solvers.threads.side_by_side`.

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
    on_axes = ((features[fold < 0] - mean) / deviation).astype(np.float32) @ whole.left
    shrink = 1 / (whole.values + 1 / penalties[:, None])  # [R, r]
    n = len(standard)
    wide = standard.shape[1] > n
    # X't of each fold's rows and their sums, on the features, or where those are many on the axes of all rows.
    table = np.column_stack([whole.rows if wide else standard, np.ones(n, np.float32)])
    forms = [None if wide else f.forms(penalties) for f in folds]

    def scored(block: Block) -> np.ndarray:
        own = np.stack([table[span].T @ part for span, part in zip(spans, block.parts, strict=True)])
        total = own.sum(axis=0)
        loss = np.zeros((len(penalties), total.shape[1]), np.float32)
        for at, (f, form) in enumerate(zip(folds, forms, strict=True)):
            if form is None:
                f.add_loss_by_rows(loss, at, block.parts, own[:, -1], penalties)
            else:
                f.add_loss(loss, total - own[at], own[at], form)
        best = np.argmin(loss, axis=0)
        pull = total[:-1] if wide else whole.left.T @ total[:-1]  # [r, m]
        weights = pull * shrink[best].T
        # The class means project to pull.weights / 2n with either sign: the threshold is midway.
        high = 0.5 * (n + total[-1])
        middle = 0.25 * (1 / high - 1 / (n - high)) * np.einsum("rm,rm->m", pull, weights)
        margins = on_axes @ weights
        margins -= middle
        return _balanced(margins, block.tested)

    return np.concatenate(list(each(scored, targets.blocks)))


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

    def forms(self, penalties: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what the squared error of the rows left out is made of.

        With X't of the others and of those left out on the axes, p and q [r], it is ``p'Ap - d'(p * q)`` at a penalty. A is
        symmetric: the first half of its columns, float32 [R, r, h], what is left of the mirrored part doubled, and below
        the rest [R, r, r - h], its first h rows not needed, [R, r - h, r - h]; d [R, r]; and from features and sums to
        the axes [r, D + 1].
        """
        shrink = (1 / (self.values + 1 / penalties[:, None])).astype(np.float32)
        a = shrink[:, :, None] * self.square * shrink[:, None, :]
        half = a.shape[1] // 2
        first, second = a[:, :, :half].copy(), a[:, half:, half:].copy()
        first[:, half:] *= 2
        return first, second, 2 * shrink, np.column_stack([self.left.T, -self.offset])

    def add_loss(self, loss: np.ndarray, others: np.ndarray, own: np.ndarray, forms: tuple[np.ndarray, ...]) -> None:
        """Add the squared error of the rows left out to loss [R, m], up to what is the same for all penalties.

        `others`, `own` are ``X't`` [D + 1, m] of standardised features and a column of ones.
        """
        first, second, linear, turn = forms
        pull, match = turn @ others, turn @ own
        match -= np.multiply.outer(self.rows[self.span].sum(axis=0) / self.n_others, others[-1])
        match *= pull
        loss -= linear @ match
        half = first.shape[2]
        image, upper, lower = match, pull[:half], pull[half:]  # in the memory of what is done with
        for at in range(len(loss)):
            np.matmul(first[at], upper, out=image)
            loss[at] += np.einsum("rm,rm->m", image, pull)
            np.matmul(second[at], lower, out=image[half:])
            loss[at] += np.einsum("rm,rm->m", image[half:], lower)

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
    margins[...] = (margins > 0).view(np.int8) - (margins < 0).view(np.int8)  # five times as fast as numpy's sign
    signs = margins.sum(axis=0)
    margins *= targets
    agreement = margins.sum(axis=0)
    # Right minus wrong, of both classes together and of their difference.
    up, down = 0.5 * (agreement + signs), 0.5 * (agreement - signs)
    return 0.5 + 0.25 * (up / high + down / (n - high))
