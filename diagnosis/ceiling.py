"""Does what a model represents bound what it says? Ceilings of behavior, violations and headroom.

Appendix B of Shu et al. (arXiv 2501.01346) holds that representation bounds behavior. The ceiling of a cell (a concept under a
condition) is the accuracy at which a linear probe reads the true answers of its rows: cross-fitted, at the best layer chosen on
other images, on the same rows and by the same metric as behavior. Behavior above the ceiling violates the bound, as far as linear
probes of these layers can tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from activation_store import ActivationStore
from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, DataError, StoreError
from groundscope.core.progress import progress_bar
from groundscope.core.result_fields import building
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count, nearest
from probes import LogisticProbe, MultinomialProbe
from probes.analysis.permutation import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from behavior import BehaviorResult

KIND, VERSION = "representation ceilings", 1
FOLDS = 5
"""Default number of parts of the images."""
MIN_GROUPS = 2
"""Smallest number of images of each answer for each fold."""
CONCEPTS = ("level", "kind", "level kind")
"""Allowed values of `concept`."""
CONDITIONS = ("split", "all")
"""Allowed values of `condition`."""


@dataclass(frozen=True)
class CeilingCell:
    """Behavior and ceiling of a concept under a condition: shares of right answers on the same rows.

    Examples
    --------
    >>> from diagnosis import CeilingCell
    >>> cell = CeilingCell("attribute color", "conflict", 90, 60, 0.7, 0.9, -0.2, -0.3, -0.1, 1.0, 1.0, ("L3",), violated=False)
    >>> round(cell.headroom, 2)
    0.2
    """

    concept: str
    condition: str
    n: int
    """Number of rows."""
    groups: int
    """Number of images."""
    behavior: float
    """Share of right answers of the model."""
    ceiling: float
    """Share of rows whose true answer the probes read."""
    difference: float
    """``behavior - ceiling``, on the same rows."""
    low: float
    """Lower end of its interval: bootstrap over images, with the choice of the layer repeated in every draw."""
    high: float
    p: float
    """One-sided p-value of a positive difference, from the same draws."""
    q: float
    """The same after Benjamini and Hochberg over all cells."""
    layers: tuple[str, ...]
    """Name of the layer that each fold uses, chosen on the other folds."""
    violated: bool
    """Whether the lower end is above 0, and q is at most half of 1 minus the confidence."""

    @property
    def headroom(self) -> float:
        """``ceiling - behavior``: how much of what is represented is not used."""
        return -self.difference


@dataclass(frozen=True, eq=False)
class Ceilings:
    """Ceilings of all cells; returned by `representation_ceiling` and `ceilings_of_readings`.

    Examples
    --------
    >>> import numpy as np
    >>> from diagnosis import ceilings_of_readings
    >>> rng = np.random.default_rng(0)
    >>> margins, correct = rng.normal(size=(3, 200)) + 1, rng.random(200) < 0.6
    >>> groups = [f"image {i // 2}" for i in range(200)]
    >>> ceilings = ceilings_of_readings(margins, correct, groups, ["color"] * 200, ["neutral"] * 200)
    >>> ceilings.frame()[["concept", "condition", "violated"]].values.tolist()
    [['color', 'neutral', False]]
    """

    cells: tuple[CeilingCell, ...]
    ids: tuple[str, ...]
    """Ids of the rows ``[n]``."""
    margins: np.ndarray
    """Margin of the true answer at the layer that the row's cell and fold use, float64 ``[n]``; NaN outside of all cells."""
    confidence: float
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Concepts without a ceiling, with the reason (``skip=True``)."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", MappingProxyType(dict(self.left_out)))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; raises `StoreError` if it cannot be written."""
        cells = [{**vars(cell), "layers": list(cell.layers)} for cell in self.cells]
        for cell in cells:
            cell |= {name: None for name, value in cell.items() if value != value}  # JSON has no NaN
        card = {"cells": cells, "ids": list(self.ids), "confidence": self.confidence, "left_out": dict(self.left_out)}
        artifacts.write(Path(path), KIND, VERSION, {"margins": self.margins}, card)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; raises `StoreError` if it is missing, damaged, or another file."""
        tensors, card = artifacts.read(Path(path), KIND, VERSION)
        with building(f"{path} is a damaged {KIND} file", StoreError):
            cells: list[dict[str, Any]] = [
                {k: math.nan if v is None else v for k, v in cell.items()} for cell in card["cells"]
            ]
            return cls(
                tuple(CeilingCell(**{**cell, "layers": tuple(map(str, cell["layers"]))}) for cell in cells),
                tuple(map(str, card["ids"])),
                tensors["margins"],
                float(card["confidence"]),
                dict(card["left_out"]),
            )

    def frame(self) -> pd.DataFrame:
        """Return one row per cell, with the fields of `CeilingCell` and ``headroom``."""
        import pandas as pd

        return pd.DataFrame([{**vars(cell), "headroom": cell.headroom} for cell in self.cells])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw behavior against ceiling: one point for each cell, filled where it is above the diagonal beyond chance."""
        import matplotlib.pyplot as plt

        axes: Any = plt.subplots(figsize=(4.6, 4.4), layout="constrained")[1] if ax is None else ax
        axes.axline((0, 0), (1, 1), color="black", linewidth=0.8)
        for k, cell in enumerate(self.cells):
            color = f"C{k % 10}"
            spread = np.abs([[cell.difference - cell.low], [cell.high - cell.difference]])
            axes.errorbar(
                [cell.ceiling], [cell.behavior], yerr=np.nan_to_num(spread), fmt="o", color=color, capsize=2,
                markerfacecolor=color if cell.violated else "white", label=f"{cell.concept}, {cell.condition}",
            )  # fmt: skip
        axes.set(
            xlabel="ceiling: accuracy of probes", ylabel="behavior: accuracy of answers", xlim=(0, 1.03), ylim=(0, 1.03)
        )
        axes.legend(frameon=False, fontsize=7)
        return axes


def representation_ceiling(
    store: ActivationStore,
    answers: BehaviorResult | None = None,
    *,
    sites: Sequence[tuple[str, str]] | None = None,
    concept: str = "level kind",
    condition: str = "split",
    C: float = 0.1,
    folds: int = FOLDS,
    resamples: int = 2000,
    confidence: float = 0.95,
    skip: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Ceilings:
    """Return the ceiling of behavior for each concept and condition, and whether behavior violates it.

    Parameters
    ----------
    store
        Activations and the model's answers.
    answers
        Other answers to the same examples, such as those of the model with a correction; by default those of the store.
    sites
        Layers as pairs of site and token selection, ``("decoder.L3.resid_post", "last")``; by default every layer of
        ``decoder.resid_post`` at ``last``.
    concept
        What one probe reads and what names the rows of a cell: ``level``, ``kind`` or ``level kind``.
    condition
        ``split``: a cell for each concept and split; ``all``: one for each concept.
    C
        Inverse penalty of the probes (`probes.LogisticProbe`; `probes.MultinomialProbe` for more than two answers).
    folds
        Number of parts of the images: each part is read by probes that were fitted to the others, at the layer that is best
        on the others.
    resamples, confidence, seed
        Number of draws of the bootstrap over images, confidence of the intervals, and seed of folds and draws.
    skip
        Leave out concepts with one answer or too few images, and name them in `Ceilings.left_out`, instead of an error.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    StoreError
        If the store has no answers, or not those of the examples of `answers`.
    ConfigError
        If an option has an unknown value.
    DataError
        If all rows of a concept have one answer, or an answer has too few images for the folds.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(40, splits=("neutral",)).where(kind="color")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = gs.trace(model, data, sites=["resid_post"], tokens=["last"], out=Path(folder) / "store", progress=False)
    ...     ceilings = gs.representation_ceiling(store, folds=3, resamples=200, progress=False)
    >>> [(cell.concept, cell.condition, cell.violated) for cell in ceilings.cells]
    [('attribute color', 'neutral', False)]
    """
    for name, value, allowed in (("concept", concept, CONCEPTS), ("condition", condition, CONDITIONS)):
        if value not in allowed:
            msg = f"unknown {name} '{value}'; choose from {', '.join(allowed)}{nearest(value, allowed)}"
            raise ConfigError(msg)
    columns = store.columns
    correct = _correct(store, answers)
    truth = np.array([str(a) for a in columns["answer"]])
    groups = np.array([str(g) for g in columns["group"]])
    concepts = np.array(
        [" ".join(row) for row in zip(*([str(v) for v in columns[n]] for n in concept.split()), strict=True)]
    )
    conditions = np.array([str(v) for v in columns["split"]]) if condition == "split" else np.full(len(truth), "all")
    if sites is None:
        sites = [(f"decoder.L{layer}.resid_post", "last") for layer in _layers(store)]
    answered = np.flatnonzero(~np.isnan(correct))
    problems = _fold_problems(concepts[answered], truth[answered], groups[answered], folds)
    if problems and (not skip or len(problems) == len(set(concepts[answered]))):
        raise DataError(next(iter(problems.values())))
    answered = answered[~np.isin(concepts[answered], list(problems))]
    fold_of = np.zeros(len(truth), int)
    fold_of[answered] = folds_of(groups[answered], folds, seed)
    margins = np.full((len(sites), len(truth)), np.nan)
    with progress_bar(progress) as bar:
        task = bar.add_task("fitting probes for ceilings", total=len(sites))
        for i, (site, tokens) in enumerate(sites):
            x = store.read(site, tokens).astype(np.float64)
            for name in dict.fromkeys(concepts[answered]):
                rows = answered[(concepts[answered] == name) & ~np.isnan(x[answered]).any(axis=1)]
                margins[i, rows] = cross_fitted_margins(x[rows], truth[rows], fold_of[rows], C=C)
            bar.advance(task)
    names = tuple(f"{site} at {tokens}" for site, tokens in sites)
    ceilings = ceilings_of_readings(
        margins[:, answered],
        correct[answered].astype(bool),
        groups[answered],
        concepts[answered],
        conditions[answered],
        layers=names,
        ids=tuple(str(v) for v in np.asarray(columns["id"])[answered]),
        folds=folds,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    return replace(ceilings, left_out=problems)


def ceilings_of_readings(
    margins: np.ndarray,
    correct: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    concepts: Sequence[str] | np.ndarray,
    conditions: Sequence[str] | np.ndarray,
    *,
    layers: Sequence[str] = (),
    ids: Sequence[str] = (),
    folds: int = FOLDS,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ceilings:
    """Return ceilings from margins of the true answers, such as those of your own probes.

    A layer is chosen for each cell and fold by its accuracy on the rows of the cell in the other folds (the first of equal ones).
    Each draw takes images with replacement, and chooses the layers again; probes are not fitted again. Where behavior is
    exactly as accurate as the best layer, the interval of one cell is above 0 about as often as it should be with one layer, and
    less often with several similar layers, because the repeated choice widens the interval (`benchmarks/ceiling.py`).

    Parameters
    ----------
    margins
        Held-out margins of the true answer against the best other, ``[layers, n]``; positive if it is read. NaN counts as not
        read.
    correct
        Whether the model's answer is right, bool ``[n]``.
    groups, concepts, conditions
        Image, concept and condition of each row, ``[n]``.
    layers, ids
        Names of layers and rows, by default their numbers.
    folds, resamples, confidence, seed
        As for `representation_ceiling`, whose folds are the same for the same `folds` and `seed`.

    Raises
    ------
    ConfigError
        If there are fewer than 100 draws, or the confidence is not between 0 and 1.
    DataError
        If sizes differ, there are no rows, or fewer images than folds.

    Examples
    --------
    >>> import numpy as np
    >>> from diagnosis import ceilings_of_readings
    >>> rng = np.random.default_rng(0)
    >>> read, said = rng.normal(size=(3, 200)) + [[0.0], [1.0], [0.5]], rng.random(200) < 0.6
    >>> groups = [f"image {i // 2}" for i in range(200)]
    >>> cell = ceilings_of_readings(read, said, groups, ["color"] * 200, ["neutral"] * 200).cells[0]
    >>> cell.layers, cell.behavior < cell.ceiling, cell.violated
    (('1', '1', '1', '1', '1'), True, False)
    """
    margins = np.asarray(margins, np.float64)
    correct = np.asarray(correct, bool)
    group_names = np.asarray(groups).astype(str)
    n = len(correct)
    sizes = {
        "margins": margins.shape[-1],
        "groups": len(group_names),
        "concepts": len(concepts),
        "conditions": len(conditions),
    }
    if wrong := next((f"{name} has {size}" for name, size in sizes.items() if size != n), None):
        msg = f"correct has {format_count(n, 'row')}, but {wrong}; pass one value for each row"
        raise DataError(msg)
    if n == 0 or margins.ndim != 2 or not len(margins):
        msg = f"margins has the shape {margins.shape}; pass [layers, n] with at least one layer and one row"
        raise DataError(msg)
    if resamples < 100 or not 0 < confidence < 1:
        msg = (
            f"resamples={resamples}, confidence={confidence}: use at least 100 draws, and a confidence between 0 and 1"
        )
        raise ConfigError(msg)
    if len(set(group_names)) < folds or folds < 2:
        msg = f"folds={folds} with {format_count(len(set(group_names)), 'image')}; use at least 2 folds, and as many images"
        raise DataError(msg)
    names = tuple(layers) or tuple(str(i) for i in range(len(margins)))
    fold_of = folds_of(group_names, folds, seed)
    cells: list[dict[str, Any]] = []
    used = np.full(n, np.nan)
    for key in sorted(set(zip(map(str, concepts), map(str, conditions), strict=True))):
        rows = np.flatnonzero(
            (np.asarray(concepts).astype(str) == key[0]) & (np.asarray(conditions).astype(str) == key[1])
        )
        cell, chosen = _cell(
            margins[:, rows] > 0, correct[rows], group_names[rows], fold_of[rows], resamples, confidence, seed
        )
        used[rows] = margins[chosen[fold_of[rows]], rows]
        layers_of_cell = tuple(names[int(chosen[f])] for f in sorted(set(fold_of[rows])))
        cells.append({"concept": key[0], "condition": key[1], **cell, "layers": layers_of_cell})
    q = benjamini_hochberg(np.array([cell["p"] for cell in cells])[None])[0]
    alpha = (1 - confidence) / 2
    return Ceilings(
        tuple(
            CeilingCell(**cell, q=float(value), violated=bool(cell["low"] > 0 and value <= alpha))
            for cell, value in zip(cells, q, strict=True)
        ),
        tuple(ids) or tuple(str(i) for i in range(n)),
        used,
        confidence,
    )


def _cell(
    read: np.ndarray,
    correct: np.ndarray,
    groups: np.ndarray,
    fold_of: np.ndarray,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the figures of one cell, and the layer of each fold, ``[folds]``."""
    unique, group = np.unique(groups, return_inverse=True)
    n_groups = len(unique)
    counts = np.bincount(group, minlength=n_groups).astype(float)
    right = np.bincount(group, weights=correct, minlength=n_groups)
    reads = np.stack([np.bincount(group, weights=row, minlength=n_groups) for row in read.astype(float)])  # [L, G]
    fold = np.zeros(n_groups, int)
    fold[group] = fold_of
    whole, chosen = _difference(np.ones((1, n_groups)), counts, right, reads, fold, int(fold_of.max()) + 1)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples).astype(float)
    draws, _ = _difference(weights, counts, right, reads, fold, int(fold_of.max()) + 1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if n_groups > 1 else (math.nan, math.nan)
    behavior = float(correct.mean())
    return {
        "n": len(correct),
        "groups": n_groups,
        "behavior": behavior,
        "ceiling": behavior - float(whole[0]),
        "difference": float(whole[0]),
        "low": float(low),
        "high": float(high),
        "p": float((1 + (draws <= 0).sum()) / (1 + resamples)),
    }, chosen


def _difference(
    weights: np.ndarray, counts: np.ndarray, right: np.ndarray, reads: np.ndarray, fold: np.ndarray, folds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return behavior minus ceiling for each row of group weights ``[R, G]``, and the layers of the first row ``[folds]``."""
    total = weights @ counts
    readable = np.zeros(len(weights))
    first = np.zeros(folds, int)
    for f in range(folds):
        own = weights * (fold == f)
        others = weights * (fold != f)
        best = (others @ reads.T).argmax(axis=1)  # equal numbers of rows for all layers: sums choose as shares do
        first[f] = best[0]
        readable += np.take_along_axis(own @ reads.T, best[:, None], axis=1)[:, 0]
    return (weights @ right - readable) / np.maximum(total, 1), first


def cross_fitted_margins(x: np.ndarray, truth: np.ndarray, fold_of: np.ndarray, *, C: float = 0.1) -> np.ndarray:
    """Return the margin of the true answer against the best other, by probes that were fitted to the other folds.

    Parameters
    ----------
    x
        Activations, float ``[n, D]``.
    truth
        True answers ``[n]``. Minus infinity is the margin of an answer that the other folds do not have.
    fold_of
        Fold of each row, ``[n]``.
    C
        Inverse penalty.

    Returns
    -------
    ndarray
        float64 ``[n]``.
    """
    margins = np.full(len(x), -np.inf)
    for f in sorted(set(fold_of.tolist())):
        train, test = np.flatnonzero(fold_of != f), np.flatnonzero(fold_of == f)
        classes = sorted(set(truth[train].tolist()))
        if len(classes) < 2:
            continue
        if len(classes) == 2:
            decision = LogisticProbe(C=C).fit(x[train], truth[train]).decision_function(x[test])
            scores = np.column_stack([-decision / 2, decision / 2])
        else:
            scores = MultinomialProbe(C=C).fit(x[train], truth[train]).decision_function(x[test])
        for row, values in zip(test, scores, strict=True):
            if truth[row] in classes:
                own = classes.index(str(truth[row]))
                margins[row] = values[own] - np.delete(values, own).max()
    return margins


def folds_of(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, int ``[n]``: groups in random order, in turn."""
    unique, number = np.unique(groups, return_inverse=True)
    place = np.empty(len(unique), int)
    place[np.random.default_rng(seed).permutation(len(unique))] = np.arange(len(unique)) % folds
    return place[number]


def _layers(store: ActivationStore) -> list[int]:
    """Return the layers of the residual stream that a store has at the last token."""
    layers = next(
        (a.layers for a in store.arrays if (a.stack, a.component, str(a.tokens)) == ("decoder", "resid_post", "last")),
        None,
    )
    if layers is None:
        msg = f"the store at {store.path} lacks decoder.resid_post at last; trace it, or pass sites=[(site, tokens), …]"
        raise StoreError(msg)
    return list(layers)


def _correct(store: ActivationStore, answers: BehaviorResult | None) -> np.ndarray:
    """Return whether each answer is right, float ``[n]``; NaN for rows without an answer."""
    columns = store.columns
    ids = [str(v) for v in columns["id"]]
    if answers is None:
        if "model_answer" not in columns:
            msg = f"the store at {store.path} has no answers of the model; trace it again, or pass answers=gs.answer(model, data)"
            raise StoreError(msg)
        return np.array(
            [float(m == a) if m else math.nan for m, a in zip(columns["model_answer"], columns["answer"], strict=True)]
        )
    by_id: Mapping[str, bool | None] = {a.id: a.correct for a in answers.answers}
    only_store, only_answers = [i for i in ids if i not in by_id], sorted(set(by_id) - set(ids))
    if only_store or only_answers:
        odd, place = (only_store[0], "answers") if only_store else (only_answers[0], "store")
        msg = f"example '{odd}' is missing in the {place}: answers and store need the same examples ({len(ids)} in the store, "
        msg += f"{len(by_id)} answers); filter both by id"
        raise StoreError(msg)
    return np.array([math.nan if by_id[i] is None else float(bool(by_id[i])) for i in ids])


def _fold_problems(concepts: np.ndarray, truth: np.ndarray, groups: np.ndarray, folds: int) -> dict[str, str]:
    """Return the reason for each concept with one answer or too few images; raise `DataError` without any row."""
    if not len(concepts):
        msg = "no row has an answer that is right or wrong; use questions with candidate answers"
        raise DataError(msg)
    problems = {}
    for name in dict.fromkeys(concepts.tolist()):
        rows = concepts == name
        answers = sorted(set(truth[rows]))
        images = len(set(groups[rows]))
        if len(answers) < 2:
            problems[name] = (
                f"all {int(rows.sum())} rows of '{name}' have the answer '{answers[0]}'; a probe needs two: leave the rows out"
            )
        elif folds < 2 or images < MIN_GROUPS * folds:
            problems[name] = (
                f"folds={folds}: '{name}' has {format_count(images, 'image')}, and needs {MIN_GROUPS} for each of at least 2 "
                "folds; use fewer folds, or more images"
            )
    return problems
