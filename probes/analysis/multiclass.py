"""Multiclass decisions among mutually exclusive concepts, by the probes of a grid or by a jointly fitted softmax probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.intervals import combined_interval
from groundscope.core.progress import step_bar
from groundscope.core.text import nearest
from probes.analysis.reproduce_split import reproduce_split
from probes.grid import ProbeGrid
from probes.protocol.cell import SELECTION
from probes.solvers.closed_form import Spectrum
from probes.solvers.logistic_float32 import RowBlock
from probes.solvers.multinomial import MultinomialFit, class_weights, fit_multinomial

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource

HOW = ("rest", "softmax")
"""Ways to combine probes into a multiclass prediction."""


def multiclass(
    grid: ProbeGrid,
    concepts: Sequence[str] | str,
    *,
    how: str = "rest",
    store: ActivationSource | None = None,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    confidence: float = 0.95,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Score multiclass predictions among concepts of which exactly one is true: the color of an object, the relation.

    Scored on held-out rows where exactly one of them is true, by the mean recall over the concepts that occur; chance is 1
    over their number.

    Parameters
    ----------
    concepts
        The concepts; or the name of a label column with classes, ``place`` for ``place:room`` and ``place:street``.
    how
        ``rest``: the concept whose one-vs-rest probe of the grid has the largest margin. ``softmax``: a multinomial
        regression (`probes.MultinomialProbe`) fitted on the grid's training rows, with its folds and candidates of C.
    store, rows
        For ``softmax``: the grid's store, and `rows` as in the call of `fit_grid`.
    confidence
        Of the intervals over groups, which have a formula.
    progress
        For ``softmax``: whether to show a progress bar; by default only on a terminal.

    Returns
    -------
    One row per layer and head: balanced_accuracy with its interval over groups, chance, and n; for ``softmax`` also C and
    gap, the proven relative distance of the fit from its optimum.

    Raises
    ------
    ProbeError
        If there are fewer than two concepts, the grid does not have all of them, no held-out row has exactly one true
        concept, or for ``softmax`` the store is missing or not the grid's, or training rows are too few.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import fit_grid, multiclass
    >>> color = np.arange(180) % 3
    >>> x = np.random.default_rng(0).normal(size=(180, 1, 8)) + 3 * np.eye(8)[color][:, None]
    >>> names = ["attribute:red", "attribute:green", "attribute:blue"]
    >>> labels = {name: color == k for k, name in enumerate(names)}
    >>> store = MemorySource({"resid_post": x}, {"id": range(180), "group": range(180), **labels})
    >>> grid = fit_grid(store, names, "resid_post", C=(0.1,), folds=2, control=0, resamples=2)
    >>> multiclass(grid, names)[["layer", "balanced_accuracy", "chance", "n"]].round(2)
       layer  balanced_accuracy  chance   n
    0      0               0.94    0.33  54
    >>> multiclass(grid, names, how="softmax", store=store)[["layer", "balanced_accuracy", "C"]].round(2)
       layer  balanced_accuracy    C
    0      0               0.94  0.1
    """
    import pandas as pd

    if isinstance(concepts, str):
        column, concepts = concepts, [c for c in grid.concepts if c.startswith(f"{concepts}:")]
        if not concepts:
            columns = list(dict.fromkeys(c.partition(":")[0] for c in grid.concepts if ":" in c))
            msg = f"no classes of '{column}' in this grid; choose from {', '.join(columns)}{nearest(column, columns)}"
            raise ProbeError(msg)
    missing = [c for c in concepts if c not in grid.concepts]
    if missing or len(set(concepts)) < 2 or len(set(concepts)) < len(concepts):
        msg = f"choose at least two different concepts from {', '.join(grid.concepts)}; got {list(concepts)}"
        raise ProbeError(msg)
    if how not in HOW:
        msg = f"unknown how='{how}'; choose from {', '.join(HOW)}{nearest(how, HOW)}"
        raise ProbeError(msg)
    if (how == "softmax") != (store is not None):
        msg = f"how='{how}' {'needs store=…, to fit a new probe' if how == 'softmax' else 'takes no store'}"
        raise ProbeError(msg)
    at = [grid.concepts.index(c) for c in concepts]
    labels = grid.held_out_labels[at]  # [C, T]
    used = (labels == 1).sum(axis=0) == 1
    used &= ~np.isnan(labels).any(axis=0)
    if not used.any():
        msg = f"no held-out example has exactly one true concept of {', '.join(concepts)}; choose mutually exclusive concepts"
        raise ProbeError(msg)
    truth = labels[:, used].argmax(axis=0)
    classes = np.unique(truth)
    names, of_row = np.unique(np.array(grid.held_out_groups)[used], return_inverse=True)
    choices = (
        _largest(grid, at, used) if store is None else _softmax_choices(grid, store, concepts, used, rows, progress)
    )
    table = []
    for where, head, predicted, *fitted in choices:
        tables = [
            [np.bincount(of_row, rows, minlength=len(names)) for rows in (of_class & (predicted == c), of_class)]
            for c, of_class in ((c, truth == c) for c in classes)
        ]
        hits, total = np.array(tables, dtype=np.float64).swapaxes(0, 1)  # [C, G] each
        recalls = hits.sum(axis=1) / total.sum(axis=1)
        low, high = combined_interval(hits, total, np.full(len(classes), 1 / len(classes)), confidence)
        cell = (grid.layers[where], grid.head_numbers[head] if grid.n_heads else pd.NA)
        table.append((*cell, float(np.mean(recalls)), float(low), float(high), 1 / len(classes), len(truth), *fitted))
    columns = ["layer", "head", "balanced_accuracy", "low", "high", "chance", "n"]
    columns += ["C", "gap"] if how == "softmax" else []
    return pd.DataFrame(table, columns=columns).astype({"head": "Int64"})


def _largest(grid: ProbeGrid, at: Sequence[int], used: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    for where in range(len(grid.layers)):
        for head in range(grid.n_heads or 1):
            yield where, head, grid.held_out_margins[at, where, head][:, used].argmax(axis=0)


def _softmax_choices(
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
    """Select C, refit on all training rows, and return the predictions on `test`, the selected C and the gap to the optimum."""
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
