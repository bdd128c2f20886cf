"""Fit probes at every layer and head of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.progress import step_bar
from groundscope.core.threads import threads_for
from probes.grid import ProbeGrid
from probes.protocol.cell import SCORES, Recipe, fit_cell
from probes.protocol.checkpoint import Checkpoint, digest
from probes.protocol.controls import majority_accuracy
from probes.protocol.estimators import Estimator, estimators, resolve
from probes.protocol.inputs import (
    ProbedArray,
    check_support,
    concept_columns,
    expand_concepts,
    find_array,
    read_features,
    read_groups,
    read_labels,
    row_mask,
)
from probes.protocol.number_labels import NUMBER_SCORES
from probes.protocol.splits import is_number
from probes.protocol.tasks import SplitRows, Task, build_tasks, split_possible, split_rows

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from sklearn.base import BaseEstimator

    from activation_store import ActivationSource
    from lvlm.token_selection import TokenSelection

C_VALUES = (1e-3, 1e-2, 1e-1, 1.0)
"""Default candidates of C."""


def fit_grid(
    store: ActivationSource,
    concepts: Sequence[str] | None = None,
    site: str = "z",
    *,
    tokens: str | TokenSelection = "last",
    heads: bool | None = None,
    estimator: str | BaseEstimator | Estimator = "logistic",
    C: Sequence[float] = C_VALUES,
    folds: int = 5,
    test_fraction: float = 0.3,
    control: int = 1,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    skip_unplaceable: bool = False,
    tolerance: float = 1e-8,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> ProbeGrid:
    """Fit a probe for each concept at every layer, and every head of `z`: linear, unless `estimator` is not.

    The protocol is the same for every cell: about `test_fraction` of the rows, in whole groups, are held out and used only
    for the final score; the other groups are divided into `folds` folds; C is
    selected by the cross-validated loss (log-loss; squared error for ``ridge``; an estimator without a loss uses the smallest
    C), and the probe refitted on all training rows. Features are standardized on the rows that a probe is fitted to.
    Classes are balanced (scikit-learn's ``class_weight="balanced"``), as in the score. All concepts share one split, so
    that no example is held out for one concept and used for training another.

    A label column with numbers other than 0 and 1 is predicted by ridge regression, with C selected by the cross-validated
    squared error, and scored by R2 (`ProbeGrid.r2`); its `validation` and `control` are R2 too. Its split balances the numbers
    above and below their median.

    Examples without a label of a concept, such as open-ended questions, are left out for that concept, and examples with an
    empty token selection for all concepts; `ProbeGrid.n_undefined` and `ProbeGrid.n_dropped` count them.

    Parameters
    ----------
    store
        An `ActivationStore`, or an object with the same methods (`activation_store.ActivationSource`).
    concepts
        Label columns of the store, ``["object:apple", "hallucinated"]``; the name of a column with classes (``place``) means
        all of them (``place:room``, ``place:street``), one against the rest. None: all that can be fitted, as with
        `skip_unplaceable`.
    site
        A component at every layer (``z``, ``resid_post``, ``vision.resid_post``), ``projector.out``, or a single layer
        (``decoder.L3.z``). A component without a stack is one of the decoder.
    tokens
        Token selection, ``last``, ``image:mean``.
    heads
        Whether to probe each head separately; by default only for `z`.
    estimator
        ``logistic`` (the reference), ``ridge``, ``lda``, ``mean_difference``, ``subspace`` (Gaussian concept subspace),
        or another name in `probes.estimators`. Or a scikit-learn classifier, ``LinearSVC(C=0.01)``: it is used with its own
        parameters on standardized features, and its gap is NaN, because its optimum is not certified. A classifier that sets
        no `coef_` (``SVC(kernel="rbf")``, a pipeline) has scores and held-out margins, but no weights and no direction. For
        concepts with numbers, a linear scikit-learn regressor, ``Lasso(0.1)``; names mean ridge there.
    C
        Candidate inverse penalties; larger means less regularization.
    folds, test_fraction
        Parameters of the split, as above.
    control
        Number of label shuffles (see `probes.protocol.controls.shuffle_labels`); for each, the whole procedure is repeated,
        including the choice of C, and the mean score is the control. 0: no control. A group is movable if its own labels
        differ, or if a group of the same size in its part (fold or held-out rows) has other labels. The control is NaN if
        fewer than 10 groups, or fewer than half, are movable; ``provenance["control_groups"]`` holds (movable, all) for
        each concept.
    rows
        Boolean mask over the examples to use.
    skip_unplaceable
        Leave out, instead of raising, concepts with too few groups of a class, or with a class missing from a part of the
        split; ``provenance["left_out"]`` has the reason for each.
    tolerance
        Maximum proven relative gap of a logistic fit to its optimum; the fits on folds, which only select C, use 1e-6 if
        `tolerance` is smaller (`probes.protocol.cell.SELECTION`).
    device
        Torch device of the logistic solver. If its memory is low, fewer fits run at a time.
    checkpoint
        Folder for finished layers, from which a killed run continues. A checkpoint of another store or of other options is
        an error.
    resamples, confidence
        Of the intervals, over held-out groups: balanced accuracy uses a formula
        (`groundscope.core.intervals.combined_interval`), the area under the ROC curve a bootstrap with `resamples` resamples.
    seed
        Of the split, the shuffles and the resamples; equal seeds give equal splits.
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
        If a concept is not in the store, is constant, or has a class in too few groups; if a scikit-learn estimator does not
        fit the labels of a concept (a classifier for numbers, a regressor for classes); if an activation of a non-empty
        selection is not finite; if an option is out of range; or if the device has no memory for a single probe.

    Notes
    -----
    Peak memory: one layer of N examples and width D, ``4 N D`` bytes as read plus ``8 N D`` in float64; two more copies of
    the head (or layer) that is being fitted; and the grid.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import fit_grid
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> grid = fit_grid(store, ["object:cat"], "resid_post", C=(0.01, 0.1), folds=2)
    >>> grid.frame()[["layer", "balanced_accuracy", "control"]].round(2)
       layer  balanced_accuracy  control
    0      0               0.53     0.54
    1      1               1.00     0.50
    """
    _check_options(C, folds, test_fraction, control, resamples, confidence, tolerance)
    recipe = _recipe(estimator, C, confidence, tolerance, device)
    array = find_array(store, site, tokens, heads=heads)
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    skip = skip_unplaceable or concepts is None
    if concepts is None:
        concepts = [c for c in concept_columns(frame) if _fits(recipe.own, frame[c].to_numpy(dtype=np.float64)[mask])]
    elif not isinstance(concepts, str):
        concepts = expand_concepts(frame, concepts)
    all_labels = read_labels(frame, concepts, numbers=True)[mask]
    ids, groups = frame["id"].to_numpy()[mask], read_groups(frame)[mask]
    if not skip:
        check_support(concepts, all_labels, groups, folds, test_fraction)

    first = read_features(store, array, array.layers[0], mask, ids)
    present = np.asarray(~np.isnan(first).all(axis=1))
    left_out: dict[str, str] = {}
    if skip:
        split = (folds, test_fraction, seed)
        used, left_out = split_possible(ids[present], groups[present], all_labels[present], concepts, *split)
        concepts, all_labels = [concepts[k] for k in used], all_labels[:, used]
    check_support(concepts, all_labels[present], groups[present], folds, test_fraction)
    table = split_rows(ids[present], groups[present], all_labels[present], folds, test_fraction, seed)
    numbers = [is_number(column) for column in table.labels.T]
    for k, concept in enumerate(concepts):
        if not _fits(recipe.own, table.labels[:, k]):
            kinds = (
                ("classifier", "numbers; give a linear regressor")
                if numbers[k]
                else ("regressor", "yes or no; give a classifier")
            )
            msg = f"{recipe.own!r} is a {kinds[0]}, but '{concept}' holds {kinds[1]}, or fit other concepts"
            raise ProbeError(msg)
    tasks = build_tasks(table, concepts, folds, control, resamples, seed)

    held_out = np.flatnonzero(table.fold < 0)
    n_heads = array.n_heads or 1
    width = first.shape[1] // n_heads
    if first.shape[1] % n_heads:
        msg = f"{array.site(array.layers[0])} of width {first.shape[1]} does not divide into {n_heads} heads"
        raise ProbeError(msg)
    name = estimator if isinstance(estimator, str) else repr(estimator)
    options: dict[str, Any] = {
        "store": store.digest,
        "weights": _weights_hash(store),
        "method": f"{recipe.estimator.description}, standardised, penalty by grouped cross-validation",
        "estimator": name,
        "penalties": [float(c) for c in C],
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
    if name in estimators.origins:
        options["estimator_package"] = estimators.origins[name]
    saved = Checkpoint.at(
        checkpoint, {**options, "place": array.stored_text, "concepts": list(concepts), "rows": digest(mask)}
    )
    out = _empty(len(concepts), len(array.layers), n_heads, width, len(held_out), numbers=any(numbers))
    label = f"probing {array.stack}.{array.component}"
    bar = step_bar(label, len(array.layers) * n_heads, show=progress)
    with threads_for(_operations(tasks, len(C), width)), bar as advance:
        for at, layer in enumerate(array.layers):
            results = saved.load(layer)
            if results is None:
                x = first if at == 0 else read_features(store, array, layer, mask, ids)
                _check_present(x, present, ids, array, layer)
                results = _fit_layer(x[present], n_heads, tasks, table, held_out, recipe, len(concepts), advance)
                saved.save(layer, results)
            else:
                advance(n_heads)
            for score, values in results.items():
                out[score][:, at] = values[:, 0]

    task_of = {k: task for task in tasks for k in task.concepts}
    concept_tasks = [task_of[k] for k in range(len(concepts))]
    return ProbeGrid(
        concepts=tuple(concepts),
        stack=array.stack,
        component=array.component,
        tokens=array.tokens,
        layers=array.layers,
        n_heads=array.n_heads,
        heads=array.heads,
        **out,
        majority=np.array(
            [np.nan if t.numbers else majority_accuracy(table.labels[t.test, k]) for k, t in enumerate(concept_tasks)]
        ),
        n_train=np.array([len(t.train) for t in concept_tasks]),
        n_test=np.array([len(t.test) for t in concept_tasks]),
        n_dropped=np.sum(~np.isnan(all_labels[~present]), axis=0).astype(np.int64),
        held_out=tuple(str(i) for i in table.ids[held_out]),
        held_out_groups=tuple(str(g) for g in table.groups[held_out]),
        held_out_labels=table.labels[held_out].T.copy(),
        train_groups=tuple(str(g) for g in np.unique(table.groups[table.fold >= 0])),
        provenance=options,
    )


def _operations(tasks: Sequence[Task], candidates: int, width: int) -> float:
    """Return the multiplications and additions in one product of an iteration: all problems of a task by its rows' features."""
    return max((task.labels.size * candidates * min(width, task.labels.shape[1]) for task in tasks), default=0)


def _fit_layer(
    x: np.ndarray,
    n_heads: int,
    tasks: Sequence[Task],
    table: SplitRows,
    held_out: np.ndarray,
    recipe: Recipe,
    n_concepts: int,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Fit every head of one layer: features [N, H * D], heads concatenated -> the grid's arrays with one layer."""
    by_head = x.reshape(len(x), n_heads, -1)
    numbers = any(task.numbers for task in tasks)
    out = _empty(n_concepts, 1, n_heads, by_head.shape[2], len(held_out), numbers=numbers)
    for head in range(n_heads):
        features = by_head[:, head].astype(np.float64)
        for task in tasks:
            fit_cell(features, task, table.groups, held_out, recipe, out, (0, head))
        advance(1)
    return out


def _recipe(
    estimator: str | BaseEstimator | Estimator, C: Sequence[float], confidence: float, tolerance: float, device: str
) -> Recipe:
    import torch

    entry, own = resolve(estimator)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        msg = f"device '{device}' cannot be used: {str(error).splitlines()[0]}; use device='cpu'"
        raise ProbeError(msg) from error
    values = np.asarray(C, float) if own is None else np.array([np.nan])
    return Recipe(entry, values, confidence, tolerance, device, own)


def _fits(own: BaseEstimator | None, labels: np.ndarray) -> bool:
    """Whether a scikit-learn estimator fits labels: a classifier not numbers, a regressor not classes."""
    from sklearn.base import is_classifier, is_regressor

    return own is None or not (is_classifier(own) if is_number(labels) else is_regressor(own))


def _check_present(x: np.ndarray, present: np.ndarray, ids: np.ndarray, array: ProbedArray, layer: int) -> None:
    """Raise `ProbeError` if a layer has other empty examples than the first layer."""
    layer_present = ~np.isnan(x).all(axis=1)
    if not np.array_equal(layer_present, present):
        row = int(np.flatnonzero(layer_present != present)[0])
        msg = (
            f"{array.site(layer)} at {array.tokens}: example '{ids[row]}' is empty in one layer and not in another; "
            f"the store is inconsistent, trace it again"
        )
        raise ProbeError(msg)


def _check_options(
    C: Sequence[float],
    folds: int,
    test_fraction: float,
    control: int,
    resamples: int,
    confidence: float,
    tolerance: float,
) -> None:
    problem = ""
    if not len(C) or not all(np.isfinite(c) and c > 0 for c in C):
        problem = f"C={list(C)} must be at least one positive number"
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


def _empty(
    n_concepts: int, n_layers: int, n_heads: int, width: int, n_held: int, *, numbers: bool
) -> dict[str, np.ndarray]:
    cells = (n_concepts, n_layers, n_heads)
    names = (*SCORES, *NUMBER_SCORES) if numbers else SCORES
    out: dict[str, np.ndarray] = {name: np.full(cells, np.nan) for name in names}
    out["weights"] = np.zeros((*cells, width))
    out["held_out_margins"] = np.full((*cells, n_held), np.nan, np.float32)
    return out


def _weights_hash(store: ActivationSource) -> str | None:
    """Return the weights digest in a store's provenance; None if it has none."""
    model = dict(getattr(store, "provenance", {})).get("model")
    return model.get("weights") if isinstance(model, Mapping) else None
