"""Baselines of a grid: the question text alone, random labels by type, random features. Each runs the same protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.text import nearest
from probes.analysis.reproduce_split import grid_site
from probes.fit import fit_grid
from probes.grid import ProbeGrid
from probes.protocol.controls import control_labels
from probes.protocol.scoring import class_totals, difference_interval

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource, ArrayInfo


class _ModifiedStore:
    """A store with replaced labels or activations."""

    def __init__(
        self,
        store: ActivationSource,
        labels: pd.DataFrame | None = None,
        features: tuple[str, np.ndarray] | None = None,
    ) -> None:
        self._store, self._labels, self._features = store, labels, features

    @property
    def arrays(self) -> Sequence[ArrayInfo]:
        return self._store.arrays

    @property
    def digest(self) -> str:
        return self._store.digest

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._store.provenance

    def frame(self) -> pd.DataFrame:
        frame = self._store.frame()
        return frame if self._labels is None else frame.assign(**{str(c): self._labels[c] for c in self._labels})

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        x = self._store.read(site, tokens, head=head, examples=examples)
        if self._features is None:
            return x
        noise = self._features[1][examples if examples is not None else slice(None)]
        return np.where(np.isnan(x).all(axis=1, keepdims=True), np.nan, noise).astype(np.float32)


def lexical_control(
    grid: ProbeGrid,
    blank: ActivationSource,
    *,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    confidence: float = 0.95,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Measure how much of a grid the text alone explains: the same probes on the same questions about a blank image.

    Parameters
    ----------
    grid
        Fitted on the real images.
    blank
        A store of the same examples (same ids, groups and labels) traced with every image replaced by the same blank
        image. The mean color of each image is not a blank image: it still contains color information.
    rows
        As in the call of `fit_grid`.
    confidence
        Of the interval of the difference, over held-out groups, paired example by example.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Returns
    -------
    One row per concept, layer and head: balanced_accuracy, lexical (with the blank image), visual (their difference) with
    visual_low and visual_high, and is_visual: whether the whole interval is above 0. A concept that is decodable but not
    is_visual can be decoded from the question.

    Raises
    ------
    ProbeError
        If the blank store's examples are not the grid's.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import fit_grid, lexical_control
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> grid = fit_grid(store, ["object:cat"], "resid_post", C=(0.1,), folds=2, resamples=50)
    >>> blank = MemorySource({"resid_post": x - x.mean(axis=2, keepdims=True)}, table)
    >>> lexical_control(grid, blank)[["layer", "balanced_accuracy", "lexical", "is_visual"]].round(2)
       layer  balanced_accuracy  lexical  is_visual
    0      0               0.53     0.51      False
    1      1               1.00     0.49       True
    """
    import pandas as pd

    grid.require_classes("the lexical control")
    blank_grid = _refit(grid, blank, rows=rows, progress=progress)
    same = blank_grid.held_out == grid.held_out and np.array_equal(
        blank_grid.held_out_labels, grid.held_out_labels, equal_nan=True
    )
    if not same:
        msg = (
            "the blank store does not hold the grid's examples: trace the same dataset, in the same order, with blank "
            "images, and use the same `rows` as in fit_grid"
        )
        raise ProbeError(msg)
    table = []
    names, of_row = np.unique(np.array(grid.held_out_groups), return_inverse=True)
    for k, at, head in np.ndindex(grid.balanced_accuracy.shape):
        used = ~np.isnan(grid.held_out_labels[k])
        truth = grid.held_out_labels[k, used]
        both = [
            class_totals(truth, g.held_out_margins[k, at, head, used][None], of_row[used], len(names))
            for g in (grid, blank_grid)
        ]
        (low,), (high,) = difference_interval(both[0], both[1], confidence)
        score, lexical = (float(g.balanced_accuracy[k, at, head]) for g in (grid, blank_grid))
        cell = (grid.concepts[k], grid.layers[at], grid.head_numbers[head] if grid.n_heads else pd.NA)
        table.append((*cell, score, lexical, score - lexical, float(low), float(high), bool(low > 0)))
    columns = "concept layer head balanced_accuracy lexical visual visual_low visual_high is_visual".split()
    return pd.DataFrame(table, columns=columns).astype({"head": "Int64"})


def control_task(
    grid: ProbeGrid,
    store: ActivationSource,
    types: str = "question",
    *,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    draws: int = 3,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Return the selectivity of Hewitt and Liang (2019): accuracy on the concept minus accuracy on a control task.

    In the control task every type has a random label, equal for all its occurrences, so that a probe can only memorize it.
    A probe that memorizes types as well as it decodes the concept is weak evidence about the activations.

    Parameters
    ----------
    types
        Column of the example table with the type of each example.
    rows
        As in the call of `fit_grid`.
    draws, seed
        Of the random labels; their scores are averaged.

    Returns
    -------
    One row per concept, layer and head: balanced_accuracy, control_task, selectivity.

    Raises
    ------
    ProbeError
        If the store has no such column, it holds only one type, or the labels cannot be split by group.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import control_task, fit_grid
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat, "question": np.arange(240) % 7}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> grid = fit_grid(store, ["object:cat"], "resid_post", C=(0.1,), folds=2, resamples=50)
    >>> control_task(grid, store, "question", draws=1)[["layer", "balanced_accuracy", "selectivity"]].round(2)
       layer  balanced_accuracy  selectivity
    0      0               0.53        -0.01
    1      1               1.00         0.52
    """
    grid.require_classes("the control task")
    frame: Any = store.frame()
    if types not in frame.columns or frame[types].nunique() < 2:
        names = [str(name) for name in frame.columns]
        msg = f"types='{types}' must be a column with at least two values; choose from {', '.join(names)}{nearest(types, names)}"
        raise ProbeError(msg)
    scores = []
    for draw in range(draws):
        labels: dict[str, np.ndarray] = {}
        for k, concept in enumerate(grid.concepts):
            true = frame[concept].to_numpy(dtype=np.float64)
            random = control_labels(frame[types].to_numpy(dtype=str), float(np.nanmean(true)), [seed, draw, k])
            labels[concept] = np.where(np.isnan(true), np.nan, random)
        changed = _ModifiedStore(store, frame.assign(**labels)[list(grid.concepts)])
        scores.append(_refit(grid, changed, rows=rows, progress=progress).balanced_accuracy)
    control = np.mean(scores, axis=0).ravel()
    table: Any = grid.frame()[["concept", "layer", "head", "balanced_accuracy"]].copy()
    table["control_task"] = control
    table["selectivity"] = table["balanced_accuracy"] - control
    return table


def random_features(
    grid: ProbeGrid,
    store: ActivationSource,
    *,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Score the same protocol on random features of the same width, correlated within groups.

    Half of their variance is common to the group, as questions about one image share the image: a split that divides
    groups would score above chance. One layer is enough: random features have no depth.

    Returns
    -------
    One row per concept and head: balanced_accuracy on random features, majority.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import fit_grid, random_features
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> grid = fit_grid(store, ["object:cat"], "resid_post", C=(0.1,), folds=2, resamples=50)
    >>> random_features(grid, store).round(2)
          concept  head  balanced_accuracy  majority
    0  object:cat  <NA>               0.64       0.5
    """
    frame = store.frame()
    _, of_row = np.unique(frame["group"].to_numpy(dtype=str), return_inverse=True)
    width = grid.weights.shape[-1] * (grid.n_heads or 1)
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(int(of_row.max()) + 1, width))[of_row] + rng.normal(size=(len(frame), width))
    fitted: Any = _refit(grid, _ModifiedStore(store, features=("all", noise)), rows=rows, progress=progress).frame()
    return fitted.loc[fitted["layer"] == grid.layers[0], ["concept", "head", "balanced_accuracy", "majority"]]


def _refit(
    grid: ProbeGrid,
    store: ActivationSource,
    *,
    rows: Sequence[bool] | np.ndarray | pd.Series | None,
    progress: bool | None,
) -> ProbeGrid:
    """Fit a grid with the options of another grid, without shuffled controls."""
    options = grid.provenance
    return fit_grid(
        store,
        grid.concepts,
        grid_site(grid),
        tokens=grid.tokens,
        heads=grid.n_heads is not None,
        estimator=options["estimator"],
        C=options["penalties"],
        folds=options["folds"],
        test_fraction=options["test_fraction"],
        control=0,
        rows=rows,
        tolerance=options["tolerance"],
        resamples=1,
        seed=options["seed"],
        progress=progress,
    )
