"""Fit probes at every layer and head of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.progress import display
from probes.grid import ProbeGrid
from probes.protocol.cell import SCORES, Recipe, fit_cell
from probes.protocol.checkpoint import Checkpoint, digest
from probes.protocol.controls import majority_accuracy
from probes.protocol.inputs import (
    Place,
    Store,
    check_support,
    find_place,
    read_features,
    read_groups,
    read_labels,
    row_mask,
)
from probes.protocol.methods import METHODS
from probes.protocol.tasks import Rows, Task, build_tasks, split_possible, split_rows

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from lvlm.token_selection import TokenSelection

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def fit_grid(
    store: Store,
    concepts: Sequence[str],
    site: str = "z",
    tokens: str | TokenSelection = "last",
    stack: str = "decoder",
    *,
    estimator: str = "logistic",
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    test_fraction: float = 0.3,
    seed: int = 0,
    heads: bool | None = None,
    control: int = 1,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    skip_unplaceable: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    tolerance: float = 1e-8,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> ProbeGrid:
    """Fit a linear probe for each concept at every layer, and every head of `z`.

    The protocol is the same for every cell: about `test_fraction` of the rows, in whole groups, are held out and used only
    for the final score; the other groups are divided into `folds` folds; the penalty with the lowest cross-validated
    log-loss is selected, and the probe refitted on all training rows. Features are standardized on the rows that a probe is
    fitted to. Classes are balanced (scikit-learn's ``class_weight="balanced"``), as in the score. All concepts share one
    split, so that no example is held out for one concept and used for training another.

    Parameters
    ----------
    store
        An `ActivationStore`, or an object with the same methods (`probes.protocol.inputs.Store`).
    concepts
        Label columns of the store, ``["object:apple", "attribute:green"]``.
    site
        Component: ``z``, ``resid_post``, …; ``out`` for the projector.
    tokens
        Token selection, ``last``, ``image:mean``.
    stack
        ``decoder``, ``vision`` or ``projector``.
    estimator
        ``logistic`` (the reference), ``ridge``, ``lda``, ``mean_difference`` or ``subspace`` (Gaussian concept subspace);
        see `probes.protocol.methods`.
    penalties
        Candidate values of C; larger means less regularization.
    folds, test_fraction, seed
        Parameters of the split, as above; equal seeds give equal splits.
    heads
        Whether to probe each head separately; by default only for `z`.
    control
        Number of label shuffles (see `probes.protocol.controls.shuffle_labels`); for each, the whole procedure is repeated,
        including the choice of the penalty, and the mean score is the control. 0: no control. The control of a concept is
        NaN if fewer than 10 of its groups, or fewer than half, have the same number of rows as another group of their fold,
        because most shuffled labels would equal the true ones; ``provenance["control_groups"]`` gives the counts by concept:
        (movable, all).
    rows
        Boolean mask over the examples to use.
    skip_unplaceable
        Leave out concepts that no split into whole groups can place (too few groups of a class, or a class that the split
        leaves out of a part) instead of raising; ``provenance["left_out"]`` has the reason for each.
    resamples, confidence
        Of the intervals, over held-out groups: balanced accuracy uses a formula
        (`groundscope.core.intervals.combined_interval`), the area under the ROC curve a bootstrap with `resamples` resamples.
    tolerance
        Maximum proven relative gap of a logistic fit to its optimum; the fits on folds, which only select a penalty, use
        1e-6 if `tolerance` is smaller (`probes.protocol.cell.SELECTION`).
    device
        Torch device of the logistic solver. If its memory is low, fewer fits run at a time.
    checkpoint
        Folder for finished layers, from which a killed run continues. A checkpoint of another store or of other options is
        an error.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Returns
    -------
    ProbeGrid

    Raises
    ------
    SiteError
        If the store has no such array, or `heads` is True for a component without heads.
    ProbeError
        If a concept is not in the store, is constant, or has a class in too few groups; if an activation of a non-empty
        selection is not finite; if an option is out of range; or if the device has no memory for a single probe.

    Notes
    -----
    Memory: one layer at a time, ``4 N D`` bytes as read and ``8 N D`` in float64 of N examples and a layer of width D,
    twice the share of one head (or layer) in addition while it is fitted, and the grid itself.
    """
    _check_options(penalties, folds, test_fraction, control, resamples, confidence, tolerance)
    recipe = _recipe(estimator, penalties, confidence, tolerance, device)
    place = find_place(store, stack, site, tokens, heads)
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    all_labels = read_labels(frame, concepts)[mask]
    ids, groups = frame["id"].to_numpy()[mask], read_groups(frame)[mask]
    if not skip_unplaceable:
        check_support(concepts, all_labels, groups, folds, test_fraction)

    first = read_features(store, place, place.layers[0], mask, ids)
    present = np.asarray(~np.isnan(first).all(axis=1))
    left_out: dict[str, str] = {}
    if skip_unplaceable:
        split = (folds, test_fraction, seed)
        used, left_out = split_possible(ids[present], groups[present], all_labels[present], concepts, *split)
        concepts, all_labels = [concepts[k] for k in used], all_labels[:, used]
    check_support(concepts, all_labels[present], groups[present], folds, test_fraction)
    table = split_rows(ids[present], groups[present], all_labels[present], folds, test_fraction, seed)
    tasks = build_tasks(table, concepts, folds, control, resamples, seed)

    held_out = np.flatnonzero(table.fold < 0)
    n_heads = place.n_heads or 1
    width = first.shape[1] // n_heads
    if first.shape[1] % n_heads:
        msg = f"{place.site(place.layers[0])} of width {first.shape[1]} does not divide into {n_heads} heads"
        raise ProbeError(msg)
    options: dict[str, Any] = {
        "store": store.digest,
        "weights": _weights_hash(store),
        "method": f"{recipe.method.description}, standardised, penalty by grouped cross-validation",
        "estimator": estimator,
        "penalties": [float(c) for c in penalties],
        "folds": int(folds),
        "test_fraction": float(test_fraction),
        "seed": int(seed),
        "control": int(control),
        "resamples": int(resamples),
        "confidence": float(confidence),
        "tolerance": float(tolerance),
        "n_rows": int(mask.sum()),
        "rows_restricted": rows is not None,
        "control_groups": {concepts[k]: list(task.movable[at]) for task in tasks for at, k in enumerate(task.concepts)},
    }
    if left_out:
        options["left_out"] = left_out
    saved = Checkpoint.at(
        checkpoint, {**options, "place": str(place), "concepts": list(concepts), "rows": digest(mask)}
    )
    out = _empty(len(concepts), len(place.layers), n_heads, width, len(held_out))
    with progress_bar(f"probing {stack}.{site}", len(place.layers) * n_heads, progress) as advance:
        for at, layer in enumerate(place.layers):
            results = saved.load(layer)
            if results is None:
                x = first if at == 0 else read_features(store, place, layer, mask, ids)
                _check_present(x, present, ids, place, layer)
                results = _fit_layer(x[present], n_heads, tasks, table, held_out, recipe, len(concepts), advance)
                saved.save(layer, results)
            else:
                advance(n_heads)
            for name, values in results.items():
                out[name][:, at] = values[:, 0]

    task_of = {k: task for task in tasks for k in task.concepts}
    concept_tasks = [task_of[k] for k in range(len(concepts))]
    return ProbeGrid(
        concepts=tuple(concepts),
        stack=stack,
        component=site,
        tokens=place.tokens,
        layers=place.layers,
        n_heads=place.n_heads,
        **out,
        majority=np.array([majority_accuracy(table.labels[t.test, k]) for k, t in enumerate(concept_tasks)]),
        n_train=np.array([len(t.train) for t in concept_tasks]),
        n_test=np.array([len(t.test) for t in concept_tasks]),
        n_dropped=np.sum(~np.isnan(all_labels[~present]), axis=0).astype(np.int64),
        held_out=tuple(str(i) for i in table.ids[held_out]),
        held_out_groups=tuple(str(g) for g in table.groups[held_out]),
        held_out_labels=table.labels[held_out].T.copy(),
        train_groups=tuple(str(g) for g in np.unique(table.groups[table.fold >= 0])),
        provenance=options,
    )


def _fit_layer(
    x: np.ndarray,
    n_heads: int,
    tasks: Sequence[Task],
    table: Rows,
    held_out: np.ndarray,
    recipe: Recipe,
    n_concepts: int,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Fit every head of one layer: features [N, H * D], heads concatenated -> the grid's arrays with one layer."""
    by_head = x.reshape(len(x), n_heads, -1)
    out = _empty(n_concepts, 1, n_heads, by_head.shape[2], len(held_out))
    for head in range(n_heads):
        features = by_head[:, head].astype(np.float64)
        for task in tasks:
            fit_cell(features, task, table.groups, held_out, recipe, out, (0, head))
        advance(1)
    return out


def _recipe(estimator: str, penalties: Sequence[float], confidence: float, tolerance: float, device: str) -> Recipe:
    import torch

    if estimator not in METHODS:
        msg = f"unknown estimator '{estimator}'; choose from {', '.join(METHODS)}"
        raise ProbeError(msg)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        msg = f"device '{device}' cannot be used: {str(error).splitlines()[0]}; use device='cpu'"
        raise ProbeError(msg) from error
    return Recipe(METHODS[estimator], np.asarray(penalties, float), confidence, tolerance, device)


def _check_present(x: np.ndarray, present: np.ndarray, ids: np.ndarray, place: Place, layer: int) -> None:
    """Raise `ProbeError` if a layer has other empty examples than the first layer."""
    layer_present = ~np.isnan(x).all(axis=1)
    if not np.array_equal(layer_present, present):
        row = int(np.flatnonzero(layer_present != present)[0])
        msg = (
            f"{place.site(layer)} at {place.tokens}: example '{ids[row]}' is empty in one layer and not in another; "
            f"the store is inconsistent, trace it again"
        )
        raise ProbeError(msg)


def _check_options(
    penalties: Sequence[float],
    folds: int,
    test_fraction: float,
    control: int,
    resamples: int,
    confidence: float,
    tolerance: float,
) -> None:
    problem = ""
    if not len(penalties) or not all(np.isfinite(c) and c > 0 for c in penalties):
        problem = f"penalties={list(penalties)} must be at least one positive number"
    elif folds < 2:
        problem = f"folds={folds} must be at least 2"
    elif not 0 < test_fraction < 1:
        problem = f"test_fraction={test_fraction} must be between 0 and 1"
    elif control < 0:
        problem = f"control={control} must be the number of shuffles, or 0"
    elif resamples < 1 or not 0 < confidence < 1:
        problem = f"resamples={resamples} must be at least 1, confidence={confidence} between 0 and 1"
    elif not tolerance > 0:
        problem = f"tolerance={tolerance} must be positive"
    if problem:
        raise ProbeError(problem)


def _empty(n_concepts: int, n_layers: int, n_heads: int, width: int, n_held: int) -> dict[str, np.ndarray]:
    cells = (n_concepts, n_layers, n_heads)
    out: dict[str, np.ndarray] = {name: np.full(cells, np.nan) for name in SCORES}
    out["weights"] = np.zeros((*cells, width))
    out["held_out_margins"] = np.full((*cells, n_held), np.nan, np.float32)
    return out


@contextmanager
def progress_bar(label: str, total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar; `progress` None shows the bar only on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with display(*columns, show=progress) as shown_bar:
        task = shown_bar.add_task(label, total=total)
        yield lambda n: shown_bar.advance(task, n)


def _weights_hash(store: Store) -> str | None:
    """Return the weights digest in a store's provenance; None if it has none."""
    model = dict(getattr(store, "provenance", {})).get("model")
    return model.get("weights") if isinstance(model, Mapping) else None
