"""What probes take from a store, checked before anything is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from concepts.schema import LEVELS
from groundscope.core.errors import ProbeError, SiteError
from lvlm.sites import TokenSelection
from probes.protocol.splits import groups_needed, support_problem

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ArrayInfo


class Store(Protocol):
    """What probes need of an `activation_store.ActivationStore`."""

    @property
    def arrays(self) -> Sequence[ArrayInfo]:
        """The arrays there are."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 that names the contents."""
        ...

    def frame(self) -> pd.DataFrame:
        """Return the table of examples: id, group, and a label column for each concept."""
        ...

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        """Return float32 [n, D]; a row of NaN where the token selection was empty."""
        ...


@dataclass(frozen=True)
class Place:
    """An array of a store that a grid is fitted on."""

    stack: str
    component: str
    tokens: str
    layers: tuple[int, ...]
    n_heads: int | None
    """None where each layer is probed whole."""

    def site(self, layer: int) -> str:
        """Return the site of a layer as printed."""
        return "projector.out" if self.stack == "projector" else f"{self.stack}.L{layer}.{self.component}"


def find_place(store: Store, stack: str, component: str, tokens: str | TokenSelection, heads: bool | None) -> Place:
    """Find the array; `heads` None means by heads for z and whole layers otherwise.

    Raises
    ------
    SiteError
        Where the store has no such array, or heads are asked of a component that has none.
    """
    selection = str(TokenSelection.parse(str(tokens)))
    found = next((a for a in store.arrays if (a.stack, a.component, a.tokens) == (stack, component, selection)), None)
    if found is None:
        there = ", ".join(f"{a.stack}.{a.component} at {a.tokens}" for a in store.arrays)
        msg = f"{stack}.{component} at {selection} not in store: it has {there}; trace again with what is missing"
        raise SiteError(msg)
    by_heads = component.endswith("z") if heads is None else heads
    if by_heads and not found.n_heads:
        msg = f"{stack}.{component} has no heads: probe it with heads=False, or z with heads"
        raise SiteError(msg)
    return Place(stack, component, selection, tuple(found.layers), found.n_heads if by_heads else None)


def concept_columns(frame: pd.DataFrame) -> list[str]:
    """Return the columns of a table of examples that are labels of concepts."""
    return [str(c) for c in frame.columns if str(c).partition(":")[0] in LEVELS and ":" in str(c)]


def read_groups(frame: pd.DataFrame) -> np.ndarray:
    """Return the group of each example, str [N]; raises `ProbeError` where one has none."""
    groups = np.array(["" if g is None or g != g else str(g) for g in frame["group"]], dtype=np.str_)
    missing = np.flatnonzero(groups == "")
    if missing.size:
        msg = (
            f"example '{frame['id'].iloc[missing[0]]}' has no group ({missing.size} of {len(frame)} examples): "
            f"splits may not divide the image or scene that examples share, so each must name it"
        )
        raise ProbeError(msg)
    return groups


def row_mask(rows: Sequence[bool] | np.ndarray | pd.Series | None, n: int) -> np.ndarray:
    """Return the rows to use, bool [n]; raises `ProbeError` unless `rows` is a boolean for each example."""
    if rows is None:
        return np.ones(n, dtype=bool)
    mask = np.asarray(rows)
    if mask.dtype != bool or mask.shape != (n,):
        msg = f"rows must be {n} booleans, one for each example of the store; got {mask.dtype} of shape {mask.shape}"
        raise ProbeError(msg)
    if not mask.any():
        msg = f"rows selects none of the {n} examples"
        raise ProbeError(msg)
    return mask


def read_labels(frame: pd.DataFrame, concepts: Sequence[str]) -> np.ndarray:
    """Return labels float64 [N, K]: 0, 1 or NaN where undefined.

    Raises
    ------
    ProbeError
        Where no concept is asked for, one comes twice, is not in the store, or has other values than 0, 1 and NaN.
    """
    there = concept_columns(frame)
    if isinstance(concepts, str) or not concepts:
        msg = f"give a list of concepts; the store has {', '.join(there) or 'none'}"
        raise ProbeError(msg)
    unknown = [c for c in concepts if c not in there]
    if unknown:
        msg = f"{_quoted(unknown)} not in store: it has {', '.join(there) or 'no concepts'}"
        raise ProbeError(msg)
    if len(set(concepts)) < len(concepts):
        msg = f"{_quoted([c for c in dict.fromkeys(concepts) if list(concepts).count(c) > 1])} asked for more than once"
        raise ProbeError(msg)
    labels = frame[list(concepts)].to_numpy(dtype=np.float64, copy=True)
    odd = ~(np.isnan(labels) | (labels == 0) | (labels == 1))
    if odd.any():
        row, column = np.argwhere(odd)[0]
        msg = (
            f"label '{concepts[column]}' of example '{frame['id'].iloc[row]}' is {labels[row, column]:g}: "
            f"labels are 1 (true), 0 (false) or NaN (undefined)"
        )
        raise ProbeError(msg)
    return labels


def read_features(store: Store, place: Place, layer: int, used: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Read a layer for the rows used, float32 [n, D]; a row whose selection was empty is all NaN.

    Raises
    ------
    ProbeError
        Where a row has some values that are not finite, naming site and example.
    """
    site = place.site(layer)
    x = store.read(site, place.tokens, examples=used)
    broken = ~np.isfinite(x).all(axis=1) & ~np.isnan(x).all(axis=1)
    if broken.any():
        first = int(np.flatnonzero(broken)[0])
        count = int((~np.isfinite(x[first])).sum())
        msg = (
            f"{site} at {place.tokens}: example '{ids[first]}' has {count} of {x.shape[1]} values that are not finite "
            f"({int(broken.sum())} such examples): trace in float32 or bfloat16, or leave them out with rows=…"
        )
        raise ProbeError(msg)
    return x


def check_support(
    concepts: Sequence[str], labels: np.ndarray, groups: np.ndarray, folds: int, test_fraction: float
) -> None:
    """Refuse concepts that cannot be split by group, all in one `ProbeError`: labels [N, K], groups [N]."""
    needed = groups_needed(folds, test_fraction)
    found = [support_problem(c, labels[:, k], groups, needed) for k, c in enumerate(concepts)]
    problems = [p for p in found if p]
    if problems:
        msg = (
            f"{'; '.join(problems)}. {folds} folds and a held-out share of {test_fraction:g} need {needed} groups of each "
            f"class: leave the concept out (probes.probeable lists those that can be fitted), use fewer folds, or add data"
        )
        raise ProbeError(msg)


def probeable(
    store: Store,
    *,
    folds: int = 5,
    test_fraction: float = 0.3,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
) -> tuple[str, ...]:
    """Return the concepts of a store with enough groups of both classes for `fit_grid` with these settings.

    Rows whose token selection was empty still count here; they depend on the selection.
    """
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    groups, needed = read_groups(frame)[mask], groups_needed(folds, test_fraction)
    concepts = concept_columns(frame)
    return tuple(
        c for c in concepts if support_problem(c, frame[c].to_numpy(dtype=np.float64)[mask], groups, needed) is None
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
