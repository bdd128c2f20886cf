"""What several probes say together: which of several concepts that exclude each other, and how that carries over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.intervals import combined_interval
from probes.grid import ProbeGrid
from probes.protocol.inputs import Store, find_place, read_features, read_groups, read_labels, row_mask
from probes.protocol.scoring import (
    auc,
    auc_interval,
    balanced_accuracy,
    balanced_accuracy_interval,
    bootstrap_auc,
    resample_groups,
)

if TYPE_CHECKING:
    import pandas as pd


def multiclass(
    grid: ProbeGrid,
    concepts: Sequence[str],
    *,
    how: str = "rest",
    store: Store | None = None,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Score the choice among concepts of which exactly one is true: the colour of the named object, which relation.

    Scored on held-out rows where exactly one of them is true, by the mean recall over the concepts that occur, so that
    knowing nothing gives 1 over their number.

    Parameters
    ----------
    how
        ``rest``: the largest margin of the grid's own probes decides, each fitted against the rest. ``softmax``: a
        multinomial regression is fitted for the choice, on the grid's training rows, with its folds and penalties
        (`probes.MultinomialProbe`): its weights are fitted together.
    store, rows
        For ``softmax``: the grid's store, and the rows given to `fit_grid`.
    confidence
        Of the intervals over groups.
    resamples, seed
        Not used since the interval has a formula; accepted so that calls stay as they are.
    progress
        For ``softmax``: whether to show a bar; by default on a terminal only.

    Returns
    -------
    A row a layer and head: balanced_accuracy with its interval over groups, chance, and n; for ``softmax`` also penalty
    and gap, the proven relative distance of the fit from its optimum.

    Raises
    ------
    ProbeError
        Where fewer than two concepts are given, the grid has not all of them, on no held-out row exactly one is true, or
        for ``softmax`` no store is given, it is not the grid's, or training rows are too few.
    """
    import pandas as pd

    del resamples, seed
    missing = [c for c in concepts if c not in grid.concepts]
    if missing or len(set(concepts)) < 2 or len(set(concepts)) < len(concepts):
        msg = f"choose among two or more concepts of the grid: it has {', '.join(grid.concepts)}; got {list(concepts)}"
        raise ProbeError(msg)
    if how not in HOW or (how == "softmax") != (store is not None):
        msg = f"how='{how}' must be one of {', '.join(HOW)}; softmax, which is fitted anew, needs store=…, rest takes none"
        raise ProbeError(msg)
    at = [grid.concepts.index(c) for c in concepts]
    labels = grid.held_out_labels[at]  # [C, T]
    used = (labels == 1).sum(axis=0) == 1
    used &= ~np.isnan(labels).any(axis=0)
    if not used.any():
        msg = f"on no held-out example exactly one of {', '.join(concepts)} is true: they are no choice"
        raise ProbeError(msg)
    truth = labels[:, used].argmax(axis=0)
    classes = np.unique(truth)
    names, of_row = np.unique(np.array(grid.held_out_groups)[used], return_inverse=True)
    if store is not None:
        from probes.analysis.softmax import softmax_choices

        choices = softmax_choices(store, grid, concepts, used, rows, progress)
    else:
        choices = _largest(grid, at, used)
    table = []
    for where, head, said, *fitted in choices:
        tables = [
            [np.bincount(of_row, rows, minlength=len(names)) for rows in (there & (said == c), there)]
            for c, there in ((c, truth == c) for c in classes)
        ]
        hits, total = np.array(tables, dtype=np.float64).swapaxes(0, 1)  # [C, G] each
        recalls = hits.sum(axis=1) / total.sum(axis=1)
        low, high = combined_interval(hits, total, np.full(len(classes), 1 / len(classes)), confidence)
        cell = (grid.layers[where], head if grid.n_heads else pd.NA)
        table.append((*cell, float(np.mean(recalls)), float(low), float(high), 1 / len(classes), len(truth), *fitted))
    columns = ["layer", "head", "balanced_accuracy", "low", "high", "chance", "n"]
    columns += ["penalty", "gap"] if how == "softmax" else []
    return pd.DataFrame(table, columns=columns).astype({"head": "Int64"})


HOW = ("rest", "softmax")
"""How a choice among concepts is made."""


def _largest(grid: ProbeGrid, at: Sequence[int], used: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    for where in range(len(grid.layers)):
        for head in range(grid.n_heads or 1):
            yield where, head, grid.held_out_margins[at, where, head][:, used].argmax(axis=0)


def transfer(
    grid: ProbeGrid,
    targets: Mapping[str, Any],
    *,
    tokens: str | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Test the grid's probes, as they are, on other examples: another split, style of images, prompt or store.

    Examples whose group was trained on are left out, whatever the store: their image is known to the probe.

    Parameters
    ----------
    targets
        Name to store, or to (store, booleans of the rows to use).
    tokens
        Another token selection than the grid's.
    resamples, confidence, seed
        Of the intervals over groups.

    Returns
    -------
    A row a target, concept, layer and head: balanced_accuracy, auc with intervals over groups, ``home`` (the grid's own
    held-out score), n, and n_known (rows left out because their group was trained on). NaN where a class is missing.

    Raises
    ------
    SiteError
        Where a store has no such array.
    ProbeError
        Where a store has not the concepts, or its activations have another width.
    """
    import pandas as pd

    table: list[dict[str, object]] = []
    known = np.array(grid.train_groups)
    for name, target in targets.items():
        store, rows = target if isinstance(target, tuple) else (target, None)
        place = find_place(store, grid.stack, grid.component, tokens or grid.tokens, grid.n_heads is not None)
        frame = store.frame()
        mask = row_mask(rows, len(frame))
        groups = read_groups(frame)
        seen = np.isin(groups, known)
        n_known = int((mask & seen).sum())
        mask = mask & ~seen  # a new array: the rows given are the caller's
        labels, ids, groups = read_labels(frame, grid.concepts)[mask], frame["id"].to_numpy()[mask], groups[mask]
        for at, layer in enumerate(grid.layers):
            if layer not in place.layers:
                continue
            x = read_features(store, place, layer, mask, ids) if mask.any() else np.empty((0, 0), np.float32)
            n_heads, width = grid.n_heads or 1, grid.weights.shape[-1]
            if mask.any() and x.shape[1] != n_heads * width:
                msg = f"'{name}': {place.site(layer)} has width {x.shape[1]}, the grid's probes read {n_heads * width}"
                raise ProbeError(msg)
            by_head = (
                x.reshape(len(x), n_heads, width).astype(np.float64) if mask.any() else np.empty((0, n_heads, width))
            )
            present = ~np.isnan(by_head).any(axis=(1, 2))
            for k, concept in enumerate(grid.concepts):
                used = present & ~np.isnan(labels[:, k])
                truth = labels[used, k]
                names, of_row = np.unique(groups[used], return_inverse=True)
                counts = resample_groups(names, resamples, [seed, k])
                for head in range(n_heads):
                    where = (k, at, head)
                    margin = by_head[used, head] @ grid.weights[where] + grid.intercepts[where]
                    score = _scores(truth, margin, of_row, counts, confidence)
                    cell = {"layer": layer, "head": head if grid.n_heads else pd.NA}
                    home = float(grid.balanced_accuracy[where])
                    counted = {"home": home, "n": len(truth), "n_known": n_known}
                    table.append({"target": name, "concept": concept, **cell, **score, **counted})
    return pd.DataFrame(table).astype({"head": "Int64"})


def _scores(
    truth: np.ndarray, margin: np.ndarray, of_row: np.ndarray, counts: np.ndarray, confidence: float
) -> dict[str, float]:
    names = ("balanced_accuracy", "low", "high", "auc", "auc_low", "auc_high")
    if not (truth == 1).any() or not (truth == 0).any():
        return dict.fromkeys(names, float("nan"))
    n_groups = counts.shape[1] and int(of_row.max()) + 1
    (low,), (high,) = balanced_accuracy_interval(truth, margin[None], of_row, n_groups, confidence)
    area = auc(truth, margin)
    draws = bootstrap_auc(truth, margin, of_row, counts)[:, None]
    (auc_low,), (auc_high,) = auc_interval(truth, np.array([area]), draws, of_row, n_groups, confidence)
    values = (balanced_accuracy(truth, margin), low, high, area, auc_low, auc_high)
    return {name: float(value) for name, value in zip(names, values, strict=True)}
