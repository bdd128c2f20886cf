"""Fitting probes at every layer and head of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from concepts.errors import ProbeError
from probes.controls import majority_accuracy
from probes.grid import ProbeGrid
from probes.inputs import Store, check_support, find_place, read_features, read_groups, read_labels, row_mask
from probes.newton import Design
from probes.solver import fit_logistic
from probes.statistics import (
    balanced_accuracy,
    bootstrap_balanced_accuracy,
    percentile_interval,
    weighted_auc,
)
from probes.tasks import Task, build_tasks, split_rows

if TYPE_CHECKING:
    import pandas as pd

    from lvlm.sites import TokenSelection

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def fit_grid(
    store: Store,
    concepts: Sequence[str],
    site: str = "z",
    tokens: str | TokenSelection = "last",
    stack: str = "decoder",
    *,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    test_fraction: float = 0.3,
    seed: int = 0,
    heads: bool | None = None,
    control: int = 1,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: bool | None = None,
) -> ProbeGrid:
    """Fit a logistic probe for each concept at every layer, and every head of `z`.

    The protocol, the same for every cell: about `test_fraction` of the rows are held out, whole groups only, and used
    once, to score; the rest is dealt to `folds` folds of whole groups; the penalty with the lowest log-loss on the rows
    left out of the folds is taken, and the probe fitted again on all training rows. Features are standardised on the
    rows a probe is fitted to. Both classes count the same (scikit-learn's ``class_weight="balanced"``), as in the score.
    One split serves all concepts, so that no example is held out for one and trained on for another.

    Parameters
    ----------
    store
        An `ActivationStore`, or anything that reads like one.
    concepts
        Label columns of the store, ``["object:apple", "attribute:green"]``.
    site
        Component: ``z``, ``resid_post``, …; ``out`` for the projector.
    tokens
        Token selection, ``last``, ``image:mean``.
    stack
        ``decoder``, ``vision`` or ``projector``.
    penalties
        Values of C to choose from; larger means less regularised.
    folds, test_fraction, seed
        Of the split, as above; equal seeds give equal splits.
    heads
        Whether each head is probed by itself; by default for `z` only.
    control
        How many times labels are shuffled (see `probes.controls.shuffle_labels`) and everything repeated, the choice
        of the penalty included; their mean score is the control. 0: none.
    rows
        Booleans, one for each example: which to use at all.
    resamples, confidence
        Of the intervals: bootstrap over held-out groups.
    progress
        Whether to show a bar; by default on a terminal only.

    Returns
    -------
    ProbeGrid

    Raises
    ------
    SiteError
        Where the store has no such array, or it has no heads.
    ProbeError
        Where a concept is not in the store, is constant, or has a class in too few groups; where an activation is not
        finite though its selection was not empty; where an option is out of range.
    """
    _check_options(penalties, folds, test_fraction, control, resamples, confidence)
    place = find_place(store, stack, site, tokens, heads)
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    all_labels = read_labels(frame, concepts)[mask]
    ids, groups = frame["id"].to_numpy()[mask], read_groups(frame)[mask]
    check_support(concepts, all_labels, groups, folds, test_fraction)

    first = read_features(store, place, place.layers[0], mask, ids)
    present = ~np.isnan(first).all(axis=1)
    check_support(concepts, all_labels[present], groups[present], folds, test_fraction)
    table = split_rows(ids[present], groups[present], all_labels[present], folds, test_fraction, seed)
    tasks = build_tasks(table, concepts, folds, control, resamples, seed)

    held = np.flatnonzero(table.fold < 0)
    n_heads = place.n_heads or 1
    if first.shape[1] % n_heads:
        msg = f"{place.site(place.layers[0])} of width {first.shape[1]} does not divide into {n_heads} heads"
        raise ProbeError(msg)
    out = _empty(len(concepts), len(place.layers), n_heads, first.shape[1] // n_heads, len(held))
    total = len(place.layers) * n_heads
    with _bar(f"probing {stack}.{site}", total, progress) as advance:
        for at, layer in enumerate(place.layers):
            x = first if at == 0 else read_features(store, place, layer, mask, ids)
            if not np.array_equal(~np.isnan(x).all(axis=1), present):
                row = int(np.flatnonzero(~np.isnan(x).all(axis=1) != present)[0])
                msg = (
                    f"{place.site(layer)} at {place.tokens}: example '{ids[row]}' is empty in one layer and not in another; "
                    f"the store is inconsistent, trace it again"
                )
                raise ProbeError(msg)
            # [N, H, D]: heads lie side by side.
            by_head = x[present].astype(np.float64).reshape(int(present.sum()), n_heads, -1)
            for head in range(n_heads):
                for task in tasks:
                    _fit_cell(by_head[:, head], task, held, np.asarray(penalties, float), confidence, out, (at, head))
                advance()

    owner = {k: task for task in tasks for k in task.concepts}
    tested = [owner[k] for k in range(len(concepts))]
    return ProbeGrid(
        concepts=tuple(concepts),
        stack=stack,
        component=site,
        tokens=place.tokens,
        layers=place.layers,
        n_heads=place.n_heads,
        **out,
        majority=np.array([majority_accuracy(table.labels[t.test, k]) for k, t in enumerate(tested)]),
        n_train=np.array([len(t.train) for t in tested]),
        n_test=np.array([len(t.test) for t in tested]),
        n_dropped=np.sum(~np.isnan(all_labels[~present]), axis=0).astype(np.int64),
        held_out=tuple(str(i) for i in table.ids[held]),
        held_out_groups=tuple(str(g) for g in table.groups[held]),
        held_out_labels=table.labels[held].T.copy(),
        provenance={
            "store": store.digest,
            "method": "logistic, L2, standardised, classes balanced, penalty by grouped cross-validation",
            "penalties": [float(c) for c in penalties],
            "folds": int(folds),
            "test_fraction": float(test_fraction),
            "seed": int(seed),
            "control": int(control),
            "resamples": int(resamples),
            "confidence": float(confidence),
            "n_rows": int(mask.sum()),
            "rows_restricted": rows is not None,
        },
    )


def _check_options(
    penalties: Sequence[float], folds: int, test_fraction: float, control: int, resamples: int, confidence: float
) -> None:
    problem = ""
    if not len(penalties) or not all(np.isfinite(c) and c > 0 for c in penalties):
        problem = f"penalties={list(penalties)} must be positive numbers, at least one"
    elif folds < 2:
        problem = f"folds={folds} must be at least 2"
    elif not 0 < test_fraction < 1:
        problem = f"test_fraction={test_fraction} must lie between 0 and 1"
    elif control < 0:
        problem = f"control={control} must be 0 or the number of shuffles"
    elif resamples < 1 or not 0 < confidence < 1:
        problem = f"resamples={resamples} must be at least 1, confidence={confidence} between 0 and 1"
    if problem:
        raise ProbeError(problem)


def _empty(n_concepts: int, n_layers: int, n_heads: int, width: int, n_held: int) -> dict[str, np.ndarray]:
    cells = (n_concepts, n_layers, n_heads)
    names = "balanced_accuracy low high auc auc_low auc_high accuracy control validation penalty gap sigma intercepts"
    out: dict[str, np.ndarray] = {name: np.full(cells, np.nan) for name in names.split()}
    out["weights"] = np.zeros((*cells, width))
    out["held_out_margins"] = np.full((*cells, n_held), np.nan, np.float32)
    return out


def _balance(labels: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Weight rows so that both classes count the same: labels [Q, n], used bool [F, n] -> float64 [Q, F, n]."""
    inside = used[None].astype(np.float64)
    total = inside.sum(axis=2, keepdims=True)
    positive = labels[:, None, :] * inside
    n_positive = positive.sum(axis=2, keepdims=True)
    share = np.where(labels[:, None, :] == 1, n_positive, total - n_positive)
    return inside * total / (2 * np.maximum(share, 1))


def _choose(
    x: np.ndarray, design: Design, labels: np.ndarray, fold: np.ndarray, penalties: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the penalty of each problem by the rows left out of its folds: labels [Q, n] -> C [Q], margins [Q, n]."""
    n_problems, n_rows = labels.shape
    present = np.unique(fold)  # a concept that is seldom defined may miss a fold
    used = fold[None] != present[:, None]  # [F, n]
    weights = _balance(labels, used)
    shape = (n_problems, len(present), len(penalties))
    fit = fit_logistic(
        design,
        np.broadcast_to(labels[:, None, None], (*shape, n_rows)).reshape(-1, n_rows),
        np.broadcast_to(penalties, shape).reshape(-1),
        np.broadcast_to(weights[:, :, None], (*shape, n_rows)).reshape(-1, n_rows),
    )
    # Each row's margin comes from the one probe that was not fitted on its fold.
    margins = np.empty((n_problems, len(penalties), n_rows))
    weight, bias = fit.coefficients.reshape(*shape, -1), fit.intercepts.reshape(shape)
    for at, number in enumerate(present):
        left_out = np.flatnonzero(fold == number)
        margins[:, :, left_out] = weight[:, at] @ x[left_out].T + bias[:, at, :, None]
    loss = np.logaddexp(0.0, -np.where(labels == 1, 1.0, -1.0)[:, None] * margins)
    balance = _balance(labels, np.ones((1, n_rows), dtype=bool))
    score = (loss * balance).sum(axis=2)  # [Q, C]
    ascending = np.argsort(penalties, kind="stable")  # between equals the stronger penalty
    best = ascending[np.argmin(score[:, ascending], axis=1)]
    return penalties[best], margins[np.arange(n_problems), best]


def _fit_cell(
    x: np.ndarray,
    task: Task,
    held: np.ndarray,
    penalties: np.ndarray,
    confidence: float,
    out: dict[str, np.ndarray],
    cell: tuple[int, int],
) -> None:
    """Fit, choose and score all concepts of a task on features [N, D] of one layer and head, into `out`."""
    training = x[task.train]
    design = Design.of(training)
    chosen, left_out = _choose(training, design, task.labels, task.fold, penalties)
    everything = np.ones((1, len(task.train)), dtype=bool)
    fit = fit_logistic(design, task.labels, chosen, _balance(task.labels, everything)[:, 0])
    margins = fit.decision(x[task.test])  # [Q, n_test]
    n = len(task.concepts)
    scores = np.array([balanced_accuracy(y, m) for y, m in zip(task.test_labels, margins, strict=True)])
    trained = fit.decision(training)[:n]
    length = np.linalg.norm(fit.coefficients[:n], axis=1)
    shared = fit.decision(x[held])
    for at, k in enumerate(task.concepts):
        where = (k, *cell)
        truth = task.test_labels[at]
        out["balanced_accuracy"][where] = scores[at]
        out["control"][where] = scores[n + at :: n].mean() if len(scores) > n else np.nan
        out["accuracy"][where] = np.mean((margins[at] > 0) == (truth == 1))
        out["validation"][where] = balanced_accuracy(task.labels[at], left_out[at])
        draws = bootstrap_balanced_accuracy(truth, margins[at : at + 1], task.resamples)[:, 0]
        out["low"][where], out["high"][where] = percentile_interval(draws, confidence)
        out["auc"][where] = weighted_auc(truth, margins[at], np.ones((1, len(truth))))[0]
        draws = weighted_auc(truth, margins[at], task.resamples)
        out["auc_low"][where], out["auc_high"][where] = percentile_interval(draws, confidence)
        out["penalty"][where], out["gap"][where] = chosen[at], fit.gap[at]
        out["sigma"][where] = trained[at].std() / length[at] if length[at] > 0 else 0.0
        out["intercepts"][where], out["weights"][where] = fit.intercepts[at], fit.coefficients[at]
        out["held_out_margins"][where] = shared[at]


@contextmanager
def _bar(what: str, total: int, progress: bool | None) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a progress bar by one cell."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
