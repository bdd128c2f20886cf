"""Exact permutation tests over a whole grid: the null distribution of the best score over all cells.

The statistic is the held-out balanced accuracy of ridge probes, for the true labels and the permuted ones alike, with the
C chosen by cross-validation each time. Ridge is linear in the labels, so one factorization per fold serves
thousands of permutations; the test is valid for any statistic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import ProbeError
from groundscope.core.permutations import LEAST_MOVABLE
from groundscope.core.progress import step_bar
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count, nearest
from groundscope.core.threads import map_in_threads
from probes.analysis.reproduce_split import reproduce_split
from probes.grid import ProbeGrid
from probes.protocol.controls import movable, shuffle_labels, shuffle_within
from probes.protocol.inputs import ProbedArray
from probes.protocol.tasks import SplitRows
from probes.solvers.ridge_many_labels import Targets, ridge_scores

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource


@dataclass(frozen=True, eq=False)
class Significance:
    """Permutation p-values of a grid's cells; arrays are float64 [K, L, H] in the grid's order.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import Significance
    >>> values = {name: np.full((1, 1, 1), 0.01) for name in ("observed", "p", "p_concept", "p_family", "q_bh", "q_by")}
    >>> counts = {"maxima": np.zeros((1, 99)), "movable": np.array([40]), "n_groups": np.array([40])}
    >>> test = Significance(("object:cat",), (3,), None, **values, **counts, provenance={})
    >>> test.frame()[["concept", "layer", "p_family"]]
          concept  layer  p_family
    0  object:cat      3      0.01
    """

    concepts: tuple[str, ...]
    layers: tuple[int, ...]
    n_heads: int | None
    observed: np.ndarray
    """Held-out balanced accuracy of the ridge probe: the statistic."""
    p: np.ndarray
    """Uncorrected p-value of each cell."""
    p_concept: np.ndarray
    """Family-wise over the layers and heads of the concept: against the best cell of each permutation."""
    p_family: np.ndarray
    """Family-wise over all concepts, layers and heads."""
    q_bh: np.ndarray
    """False discovery rate over the grid (Benjamini and Hochberg 1995), for independent or positively dependent cells."""
    q_by: np.ndarray
    """False discovery rate under any dependence (Benjamini and Yekutieli 2001)."""
    maxima: np.ndarray
    """float64 [K, B]: the best cell of each concept in each permutation."""
    movable: np.ndarray
    """int64 [K]: number of groups that can receive other labels; the other groups keep theirs."""
    n_groups: np.ndarray
    """int64 [K]: number of groups in which the concept is defined."""
    provenance: Mapping[str, Any]
    heads: tuple[int, ...] = ()
    """Numbers of the heads of a subset; else 0 to n_heads-1."""

    def __post_init__(self) -> None:
        artifacts.freeze(self)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    __repr__ = short_repr

    def frame(self) -> pd.DataFrame:
        """Return one row per concept, layer and head; `head` is missing for probes on whole layers.

        ``movable`` and ``n_groups`` are values of the concept.
        """
        import pandas as pd

        k, at, head = (index.ravel() for index in np.indices(self.p.shape))
        scores = ("observed", "p", "p_concept", "p_family", "q_bh", "q_by")
        return pd.DataFrame(
            {
                "concept": np.array(self.concepts, dtype=object)[k],
                "layer": np.array(self.layers)[at],
                "head": ProbedArray("", "", "", self.layers, self.n_heads, self.heads).head_column(head),
                **{name: getattr(self, name).ravel() for name in scores},
                "movable": self.movable[k],
                "n_groups": self.n_groups[k],
            }
        )


LABEL_BYTES = 512 * 2**20
"""Memory limit of permuted labels; if they need more, they are split into parts and the activations are read per part."""


def permutation_test(
    grid: ProbeGrid,
    store: ActivationSource,
    *,
    permutations: int = 1000,
    scheme: str = "blocks",
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Significance:
    """Test every cell of a grid against permuted labels, on the grid's own split, folds and candidates of C.

    Parameters
    ----------
    grid
        The grid to test.
    store
        The store that it was fitted on.
    permutations
        B; p-values are ``(1 + number at least as high) / (1 + B)``.
    scheme
        ``blocks``: groups with equally many rows exchange their blocks of labels, within each fold and within the held-out
        part (`probes.protocol.controls.shuffle_labels`); a group of unique size keeps its labels. ``within``: labels are
        permuted among the rows of each group, which preserves information about the group itself; for concepts that vary
        within groups.
    rows
        As given to `fit_grid`.
    seed
        Of the permutations. All cells use the same permutations, so that the maximum over cells respects their dependence.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Returns
    -------
    Significance
        p of each cell; family-wise p from the maximum over all cells and concepts, and over the cells of each concept
        (Westfall and Young 1993); Benjamini-Hochberg and Benjamini-Yekutieli q; and the number of movable groups.

    Raises
    ------
    ProbeError
        If the store is not the grid's, `rows` selects other examples, an option is out of range, a concept is constant
        within all groups and `scheme` is ``within``, or fewer than `groundscope.core.permutations.LEAST_MOVABLE` (10) of a
        concept's groups can receive other labels.

    Notes
    -----
    Memory: the permuted labels (at most `LABEL_BYTES`, float32 [N, B K]), one layer, and on each of torch's
    threads about ten arrays of D x `probes.solvers.ridge_many_labels.CHUNK` float32 values. Everything is computed in float32;
    a permuted labeling that scores as high as the true one counts against the concept.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import fit_grid, permutation_test
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> grid = fit_grid(store, ["object:cat"], "resid_post", C=(0.1,), folds=2, resamples=50)
    >>> test = permutation_test(grid, store, permutations=49)
    >>> test.frame()[["layer", "observed", "p_family"]].round(2)
       layer  observed  p_family
    0      0      0.53      0.52
    1      1      1.00      0.02
    """
    if permutations < 1:
        msg = f"permutations={permutations} must be at least 1"
        raise ProbeError(msg)
    if scheme not in SCHEMES:
        msg = f"unknown scheme '{scheme}'; choose from {', '.join(SCHEMES)}{nearest(scheme, SCHEMES)}"
        raise ProbeError(msg)
    grid.require_classes("the permutation test")
    setup = reproduce_split(grid, store, rows)
    array, table = setup.array, setup.table
    families = list(_families(table))
    if scheme == "within":
        _check_varies(table, grid.concepts)
    moving = np.array([_movable(table, k, scheme) for k in range(len(grid.concepts))])  # [K, 2]
    _check_movable(grid.concepts, moving)
    C = np.sort(np.asarray(grid.provenance["penalties"], dtype=np.float32))
    n_heads = grid.n_heads or 1
    n_concepts = len(grid.concepts)
    observed = np.empty((n_concepts, len(array.layers), n_heads), np.float32)
    exceed = np.zeros(observed.shape, np.int64)
    maxima = np.full((n_concepts, permutations), -np.inf, np.float32)
    size = max(1, LABEL_BYTES // (4 * max(1, len(table.ids)) * n_concepts))
    parts = [range(a, min(a + size, permutations)) for a in range(0, permutations, size)]
    steps = len(parts) * len(array.layers) * n_heads
    bar = step_bar(f"permuting {grid.stack}.{grid.component}", steps, show=progress)
    with bar as advance, map_in_threads() as map_blocks:
        for part in parts:
            targets_by_family = [
                (members, rows_, _labels(table, members, rows_, part, scheme, seed)) for members, rows_ in families
            ]
            for at in range(len(array.layers)):
                by_head = setup.by_head(at)
                for head in range(n_heads):
                    for members, rows_, targets in targets_by_family:
                        scores = ridge_scores(by_head[rows_, head], targets, C, map_blocks)
                        scores = scores.reshape(len(part) + 1, len(members))
                        chosen = list(members)
                        observed[chosen, at, head] = scores[0]
                        exceed[chosen, at, head] += (scores[1:] >= scores[0]).sum(axis=0)
                        best = maxima[chosen, part.start : part.stop]
                        maxima[chosen, part.start : part.stop] = np.maximum(best, scores[1:].T)
                    advance()
    return adjust(grid, observed.astype(np.float64), exceed, maxima.astype(np.float64), moving, scheme, seed)


SCHEMES = ("blocks", "within")


def _families(table: SplitRows) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yield the groups of concepts that are defined on the same rows, with these rows."""
    families: dict[bytes, list[int]] = {}
    for k in range(table.labels.shape[1]):
        families.setdefault(np.isnan(table.labels[:, k]).tobytes(), []).append(k)
    for members in families.values():
        yield tuple(members), np.flatnonzero(~np.isnan(table.labels[:, members[0]]))


def _labels(table: SplitRows, members: Sequence[int], rows: np.ndarray, part: range, scheme: str, seed: int) -> Targets:
    """Return the targets of (1 + permutations) x concepts columns, the true labels first."""
    true = table.labels[rows][:, list(members)]
    out = np.empty((len(rows), len(part) + 1, len(members)), np.float32)
    out[:, 0] = 2 * true - 1
    groups, fold = table.groups[rows], table.fold[rows]
    _, numbers = np.unique(groups, return_inverse=True)
    shuffle = shuffle_labels if scheme == "blocks" else shuffle_within
    for at, number in enumerate(part):
        # One permutation for all concepts, which preserves the dependence between their labels.
        out[:, at + 1] = 2 * shuffle(true, numbers, fold, [seed, number]) - 1
    return Targets.of(out.reshape(len(rows), -1), fold)


def _movable(table: SplitRows, concept: int, scheme: str) -> tuple[int, int]:
    """Return the number of a concept's groups that can receive other labels, and its number of groups."""
    rows = ~np.isnan(table.labels[:, concept])
    return movable(table.labels[rows, concept], table.groups[rows], table.fold[rows], scheme)


def _check_movable(concepts: Sequence[str], moving: np.ndarray) -> None:
    few = [
        f"'{c}': {m} of {format_count(n, 'group')}"
        for c, (m, n) in zip(concepts, moving.tolist(), strict=True)
        if m < LEAST_MOVABLE
    ]
    if few:
        msg = (
            f"{', '.join(few)} can receive other labels, {LEAST_MOVABLE} are needed: labels are exchanged among groups with "
            f"equally many rows in one fold; use rows=… to select equally many rows per group, fewer folds, or more data"
        )
        raise ProbeError(msg)


def _check_varies(table: SplitRows, concepts: Sequence[str]) -> None:
    constant = []
    for k, concept in enumerate(concepts):
        rows = ~np.isnan(table.labels[:, k])
        names, of_row = np.unique(table.groups[rows], return_inverse=True)
        share = np.bincount(of_row, table.labels[rows, k]) / np.bincount(of_row)
        if ((share == 0) | (share == 1)).all():
            constant.append(f"'{concept}' ({format_count(len(names), 'group')})")
    if constant:
        msg = (
            f"{', '.join(constant)}: constant within every group, so that nothing can be permuted; use scheme='blocks'"
        )
        raise ProbeError(msg)


def adjust(
    grid: ProbeGrid,
    observed: np.ndarray,
    exceed: np.ndarray,
    maxima: np.ndarray,
    moving: np.ndarray,
    scheme: str,
    seed: int,
) -> Significance:
    """Compute p-values from the number of permutations that reach each cell [K, L, H] and the maxima [K, B].

    `moving` [K, 2] holds the numbers of movable groups and of all groups of each concept.
    """
    n = maxima.shape[1]
    p = (1 + exceed) / (1 + n)
    by_concept = np.stack([_share_above(maxima[k], observed[k]) for k in range(len(observed))])
    return Significance(
        concepts=grid.concepts,
        layers=grid.layers,
        n_heads=grid.n_heads,
        heads=grid.heads,
        observed=observed,
        p=p,
        p_concept=by_concept,
        p_family=_share_above(maxima.max(axis=0), observed),
        q_bh=benjamini_hochberg(p),
        q_by=benjamini_yekutieli(p),
        maxima=maxima,
        movable=moving[:, 0].copy(),
        n_groups=moving[:, 1].copy(),
        provenance={"grid": dict(grid.provenance), "permutations": n, "scheme": scheme, "seed": seed},
    )


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Return adjusted p-values of any shape: rejecting all values up to q controls the false discovery rate at q."""
    return _step_up(p, 1.0)


def benjamini_yekutieli(p: np.ndarray) -> np.ndarray:
    """Return adjusted p-values valid under any dependence: larger by the harmonic number of their count."""
    return _step_up(p, float(np.sum(1 / np.arange(1, np.size(p) + 1))))


def _step_up(p: np.ndarray, factor: float) -> np.ndarray:
    flat = np.asarray(p, dtype=np.float64).ravel()
    order = np.argsort(flat, kind="stable")
    scaled = flat[order] * factor * len(flat) / np.arange(1, len(flat) + 1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted.reshape(np.shape(p))


def _share_above(null: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return ``(1 + #{null >= observed}) / (1 + B)`` for a null [B] and any array of observed values."""
    ordered = np.sort(null)
    reached = len(ordered) - np.searchsorted(ordered, observed, side="left")
    return (1 + reached) / (1 + len(ordered))
