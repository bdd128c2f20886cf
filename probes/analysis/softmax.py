"""Multinomial probes of concepts that exclude each other, at every layer and head of a grid, by the grid's protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError
from probes.analysis.refit import split_again
from probes.fit import bar
from probes.protocol.cell import SELECTION
from probes.protocol.inputs import Store
from probes.solvers.closed_form import Spectrum
from probes.solvers.logistic_float32 import RowBlock
from probes.solvers.multinomial import MultinomialFit, class_weights, fit_multinomial

if TYPE_CHECKING:
    import pandas as pd

    from probes.grid import ProbeGrid


def softmax_choices(
    store: Store,
    grid: ProbeGrid,
    concepts: Sequence[str],
    used: np.ndarray,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[int, int, np.ndarray, float, float]]:
    """Fit a multinomial probe a layer and head on the grid's training rows, and let it choose on the held-out ones.

    The penalty of the grid's with the lowest log-loss on rows left out of the folds is taken, all classes counting the
    same. Only training rows where exactly one concept is true are fitted to.

    Parameters
    ----------
    used
        bool [T]: held-out rows to choose on.

    Yields
    ------
    Place of the layer, head, choices int [T used], penalty, proven relative gap.

    Raises
    ------
    ProbeError
        Where the store is not the grid's, or a concept is never, or in one fold only, the one true one in training.
    """
    again = split_again(store, grid, rows)
    labels = again.table.labels[:, [grid.concepts.index(c) for c in concepts]]
    training = np.flatnonzero(
        (again.table.fold >= 0) & ((labels == 1).sum(axis=1) == 1) & ~np.isnan(labels).any(axis=1)
    )
    classes, fold = labels[training].argmax(axis=1), again.table.fold[training]
    for k, concept in enumerate(concepts):
        if (count := len(np.unique(fold[classes == k]))) < 2:
            msg = (
                f"'{concept}' is the one true concept of training rows in {count} of {len(np.unique(fold))} folds, 2 are "
                f"needed: leave it out of the choice"
            )
            raise ProbeError(msg)
    test = np.flatnonzero(again.table.fold < 0)[used]
    n_heads = again.place.n_heads or 1
    with bar(f"choosing {grid.stack}.{grid.component}", len(grid.layers) * n_heads, progress) as advance:
        for at in range(len(grid.layers)):
            by_head = again.by_head(at)
            for head in range(n_heads):
                x = by_head[:, head]
                yield at, head, *_choose(x[training], classes, fold, x[test], len(concepts), grid)
                advance(1)


def _choose(
    x: np.ndarray, classes: np.ndarray, fold: np.ndarray, test: np.ndarray, count: int, grid: ProbeGrid
) -> tuple[np.ndarray, float, float]:
    """Choose the penalty, fit again on all training rows: choices on `test`, penalty and gap."""
    penalties = sorted(grid.provenance["penalties"])
    tolerance = float(grid.provenance["tolerance"])
    loss = np.zeros(len(penalties))
    weights = class_weights(classes, count)
    for number in np.unique(fold):
        out = fold == number
        block = RowBlock.of(x[~out])
        spectrum, fit = Spectrum(block.standard.numpy()), None
        left = _standard(x[out], block)
        for at, c in enumerate(penalties):
            fit = fit_multinomial(spectrum, classes[~out], count, c, tolerance=max(tolerance, SELECTION), start=fit)
            margins = _margins(fit, left)
            margins -= margins.max(axis=1, keepdims=True)
            lost = np.log(np.exp(margins).sum(axis=1)) - margins[np.arange(len(margins)), classes[out]]
            loss[at] += weights[out] @ lost
    best = float(penalties[int(np.argmin(loss))])  # between equals the stronger penalty
    block = RowBlock.of(x)
    fit = fit_multinomial(Spectrum(block.standard.numpy()), classes, count, best, tolerance=tolerance)
    return _margins(fit, _standard(test, block)).argmax(axis=1), best, fit.gap


def _standard(x: np.ndarray, block: RowBlock) -> np.ndarray:
    varies = block.deviation > 0
    return np.divide(x - block.mean, block.deviation, out=np.zeros(x.shape), where=varies)


def _margins(fit: MultinomialFit, standard: np.ndarray) -> np.ndarray:
    return standard @ fit.coefficients.T + fit.intercepts
