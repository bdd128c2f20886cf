"""Multinomial probes of mutually exclusive concepts, at every layer and head of a grid, by the grid's protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.progress import step_bar
from probes.analysis.refit import reproduce_split
from probes.protocol.cell import SELECTION
from probes.solvers.closed_form import Spectrum
from probes.solvers.logistic_float32 import RowBlock
from probes.solvers.multinomial import MultinomialFit, class_weights, fit_multinomial

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource
    from probes.grid import ProbeGrid


def softmax_choices(
    grid: ProbeGrid,
    store: ActivationSource,
    concepts: Sequence[str],
    used: np.ndarray,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[int, int, np.ndarray, float, float]]:
    """Fit a multinomial probe per layer and head on the grid's training rows, and predict classes on the held-out rows.

    The C (of the grid's candidates) with the lowest cross-validated log-loss is used, with balanced classes. Training
    rows are those where exactly one concept is true.

    Parameters
    ----------
    used
        bool [T]: held-out rows to predict.

    Yields
    ------
    Index of the layer, head, predicted classes int [T used], C, proven relative gap.

    Raises
    ------
    ProbeError
        If the store is not the grid's, or a concept is the only true concept of training rows in fewer than 2 folds.
    """
    setup = reproduce_split(grid, store, rows)
    labels = setup.table.labels[:, [grid.concepts.index(c) for c in concepts]]
    training = np.flatnonzero(
        (setup.table.fold >= 0) & ((labels == 1).sum(axis=1) == 1) & ~np.isnan(labels).any(axis=1)
    )
    classes, fold = labels[training].argmax(axis=1), setup.table.fold[training]
    for k, concept in enumerate(concepts):
        if (count := len(np.unique(fold[classes == k]))) < 2:
            msg = (
                f"'{concept}' is the only true concept of training rows in {count} of {len(np.unique(fold))} folds, 2 are "
                f"needed; remove it from the concepts"
            )
            raise ProbeError(msg)
    test = np.flatnonzero(setup.table.fold < 0)[used]
    n_heads = setup.array.n_heads or 1
    with step_bar(f"choosing {grid.stack}.{grid.component}", len(grid.layers) * n_heads, show=progress) as advance:
        for at in range(len(grid.layers)):
            by_head = setup.by_head(at)
            for head in range(n_heads):
                x = by_head[:, head]
                yield at, head, *_choose(x[training], classes, fold, x[test], len(concepts), grid)
                advance()


def _choose(
    x: np.ndarray, classes: np.ndarray, fold: np.ndarray, test: np.ndarray, count: int, grid: ProbeGrid
) -> tuple[np.ndarray, float, float]:
    """Select C, refit on all training rows, and return predictions on `test`, C and gap."""
    candidates = sorted(grid.provenance["penalties"])
    tolerance = float(grid.provenance["tolerance"])
    loss = np.zeros(len(candidates))
    weights = class_weights(classes, count)
    for number in np.unique(fold):
        out = fold == number
        block = RowBlock.of(x[~out])
        spectrum, fit = Spectrum(block.standard.numpy()), None
        validation = _standardize(x[out], block)
        for at, c in enumerate(candidates):
            fit = fit_multinomial(spectrum, classes[~out], count, c, tolerance=max(tolerance, SELECTION), start=fit)
            margins = _margins(fit, validation)
            margins -= margins.max(axis=1, keepdims=True)
            row_loss = np.log(np.exp(margins).sum(axis=1)) - margins[np.arange(len(margins)), classes[out]]
            loss[at] += weights[out] @ row_loss
    best = float(candidates[int(np.argmin(loss))])  # ties: the stronger penalty
    block = RowBlock.of(x)
    fit = fit_multinomial(Spectrum(block.standard.numpy()), classes, count, best, tolerance=tolerance)
    return _margins(fit, _standardize(test, block)).argmax(axis=1), best, fit.gap


def _standardize(x: np.ndarray, block: RowBlock) -> np.ndarray:
    varies = block.deviation > 0
    return np.divide(x - block.mean, block.deviation, out=np.zeros(x.shape), where=varies)


def _margins(fit: MultinomialFit, standard: np.ndarray) -> np.ndarray:
    return standard @ fit.coefficients.T + fit.intercepts
