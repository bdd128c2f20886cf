"""The result of a permutation test: p-values with corrections for the number of cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.short_repr import short_repr

if TYPE_CHECKING:
    import pandas as pd

    from probes.grid import ProbeGrid


@dataclass(frozen=True, eq=False)
class Significance:
    """Permutation p-values of a grid's cells; arrays are float64 [K, L, H] in the grid's order."""

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

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in ("observed", "p", "p_concept", "p_family", "q_bh", "q_by", "maxima", "movable", "n_groups"):
            getattr(self, name).setflags(write=False)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

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
                "head": pd.array(head if self.n_heads else [pd.NA] * len(head), dtype="Int64"),
                **{name: getattr(self, name).ravel() for name in scores},
                "movable": self.movable[k],
                "n_groups": self.n_groups[k],
            }
        )


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
