"""Test the probes of a grid, without refitting, on other examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ProbeError
from probes.analysis.reproduce_split import grid_array
from probes.grid import ProbeGrid
from probes.protocol.inputs import read_features, read_groups, read_labels, row_mask
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


def transfer(
    grid: ProbeGrid,
    targets: Mapping[str, Any],
    *,
    tokens: str | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Test the grid's probes, without refitting, on other examples: another split, image style, prompt or store.

    Examples of training groups are excluded in every store, because the probe was fitted on their image.

    Parameters
    ----------
    targets
        By name: a store, or a pair of a store and a boolean mask of the rows to use.
    tokens
        Token selection; by default the grid's.
    resamples, confidence, seed
        Of the intervals over groups.

    Returns
    -------
    One row per target, concept, layer and head: balanced_accuracy, auc with intervals over groups, ``home`` (the grid's own
    held-out score), n, and n_known (number of rows excluded because they belong to training groups). NaN if a class is
    missing.

    Raises
    ------
    SiteError
        If a store has no such array.
    ProbeError
        If a store does not have the concepts, or its activations have another width.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import fit_grid, transfer
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> grid = fit_grid(store, ["object:cat"], "resid_post", C=(0.1,), folds=2, resamples=50)
    >>> shifted = MemorySource({"resid_post": x + 0.1}, {**table, "group": np.arange(240) // 2 + 1000})
    >>> transfer(grid, {"shifted": shifted}, resamples=50)[["target", "layer", "balanced_accuracy", "home", "n"]].round(2)
        target  layer  balanced_accuracy  home    n
    0  shifted      0               0.56  0.53  240
    1  shifted      1               1.00  1.00  240
    """
    import pandas as pd

    grid.require_classes("transfer")
    table: list[dict[str, object]] = []
    train_groups = np.array(grid.train_groups)
    for name, target in targets.items():
        store, rows = target if isinstance(target, tuple) else (target, None)
        array = grid_array(grid, store, tokens)
        frame = store.frame()
        mask = row_mask(rows, len(frame))
        groups = read_groups(frame)
        trained = np.isin(groups, train_groups)
        n_known = int((mask & trained).sum())
        mask = mask & ~trained  # a new array, because `rows` belongs to the caller
        labels, ids, groups = read_labels(frame, grid.concepts)[mask], frame["id"].to_numpy()[mask], groups[mask]
        for at, layer in enumerate(grid.layers):
            if layer not in array.layers:
                continue
            x = read_features(store, array, layer, mask, ids) if mask.any() else np.empty((0, 0), np.float32)
            n_heads, width = grid.n_heads or 1, grid.weights.shape[-1]
            if mask.any() and x.shape[1] != n_heads * width:
                msg = f"'{name}': {array.site(layer)} has width {x.shape[1]}, the grid's probes need {n_heads * width}"
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
                    cell = {"layer": layer, "head": grid.head_numbers[head] if grid.n_heads else pd.NA}
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
