"""Read and check the inputs of probes from a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from concepts.label_names import is_label_name
from groundscope.core.errors import ProbeError, SiteError
from groundscope.core.text import format_count, nearest
from lvlm.sites import parse_component
from lvlm.token_selection import TokenSelection
from probes.protocol.splits import groups_needed, support_problem

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.source import ActivationSource


@dataclass(frozen=True)
class ProbedArray:
    """The array of a store that a grid is fitted on."""

    stack: str
    component: str
    tokens: str
    layers: tuple[int, ...]
    n_heads: int | None
    """None for probes on whole layers."""
    heads: tuple[int, ...] = ()
    """Numbers of the heads if the store has only some of them; else 0 to n_heads-1."""

    @property
    def head_numbers(self) -> tuple[int, ...]:
        """The number of each head; one entry, 0, for probes on whole layers."""
        return self.heads or tuple(range(self.n_heads or 1))

    def site(self, layer: int) -> str:
        """Return the site of a layer, for example ``decoder.L3.z``."""
        return "projector.out" if self.stack == "projector" else f"{self.stack}.L{layer}.{self.component}"

    def head_column(self, positions: np.ndarray) -> pd.api.extensions.ExtensionArray:
        """Return the number of the head at each position along the axis of heads; missing for probes on whole layers."""
        import pandas as pd

        numbers = np.array(self.head_numbers)[positions] if self.n_heads else [pd.NA] * len(positions)
        return pd.array(numbers, dtype="Int64")

    @property
    def stored_text(self) -> str:
        """The text that checkpoints of every release record."""
        return (
            f"Place(stack={self.stack!r}, component={self.component!r}, tokens={self.tokens!r}, layers={self.layers!r}, "
            f"n_heads={self.n_heads!r}{f', heads={self.heads!r}' if self.heads else ''})"
        )


def find_array(
    store: ActivationSource, site: str, tokens: str | TokenSelection, *, heads: bool | None = None
) -> ProbedArray:
    """Find the array of a site: ``z``, ``vision.resid_post``, ``projector.out``, or one layer, ``decoder.L3.z``.

    `heads` None means heads for z and whole layers otherwise.

    Raises
    ------
    SiteError
        If the store has no such array, or heads are requested of a component without heads.
    """
    stack, component, layer = parse_component(site)
    selection = str(TokenSelection.parse(str(tokens)))
    array = next((a for a in store.arrays if (a.stack, a.component, a.tokens) == (stack, component, selection)), None)
    if array is None:
        stored = [f"{a.stack}.{a.component} at {a.tokens}" for a in store.arrays]
        name = f"{stack}.{component} at {selection}"
        msg = f"{name} not in store; choose from {', '.join(stored)}, or trace this site and selection{nearest(name, stored)}"
        raise SiteError(msg)
    if layer is not None and layer not in array.layers:
        msg = f"{site} not in store; choose from layers {', '.join(map(str, array.layers))}, or trace this site"
        raise SiteError(msg)
    by_heads = component.endswith("z") if heads is None else heads
    if by_heads and not array.n_heads:
        msg = f"{stack}.{component} has no heads; use heads=False, or probe z"
        raise SiteError(msg)
    layers = tuple(array.layers) if layer is None else (layer,)
    if not by_heads:
        return ProbedArray(stack, component, selection, layers, None)
    return ProbedArray(stack, component, selection, layers, array.n_heads, array.heads)


def concept_columns(frame: pd.DataFrame) -> list[str]:
    """Return the columns of an example table that are concept labels: numeric columns that are not fields of an example."""
    return [str(c) for c in frame.columns if is_label_name(str(c)) and frame[c].dtype.kind in "bifu"]


def expand_concepts(frame: pd.DataFrame, concepts: Sequence[str]) -> list[str]:
    """Replace the name of each column of classes, such as ``place``, by one concept per class, such as ``place:room``."""
    available = concept_columns(frame)
    expanded: list[str] = []
    for concept in concepts:
        of_column = [name for name in available if name.startswith(f"{concept}:")]
        expanded += [concept] if concept in available or not of_column else of_column
    return expanded


def read_groups(frame: pd.DataFrame) -> np.ndarray:
    """Return the group of each example, str [N]; raise `ProbeError` if one has no group."""
    groups = np.array(["" if g is None or g != g else str(g) for g in frame["group"]], dtype=np.str_)
    missing = np.flatnonzero(groups == "")
    if missing.size:
        msg = (
            f"example '{frame['id'].iloc[missing[0]]}' has no group ({missing.size} of {format_count(len(frame), 'example')}): "
            f"splits must not divide examples of one image or scene, so every example needs its group"
        )
        raise ProbeError(msg)
    return groups


def row_mask(rows: Sequence[bool] | np.ndarray | pd.Series | None, n: int) -> np.ndarray:
    """Return the rows to use, bool [n]; raise `ProbeError` unless `rows` is a boolean mask of all examples."""
    if rows is None:
        return np.ones(n, dtype=bool)
    mask = np.asarray(rows)
    if mask.dtype != bool or mask.shape != (n,):
        msg = f"rows must be {n} booleans, one for each example of the store; got {mask.dtype} of shape {mask.shape}"
        raise ProbeError(msg)
    if not mask.any():
        msg = f"rows selects none of the {format_count(n, 'example')}; select at least one"
        raise ProbeError(msg)
    return mask


def read_labels(frame: pd.DataFrame, concepts: Sequence[str], *, numbers: bool = False) -> np.ndarray:
    """Return labels float64 [N, K]: 0, 1 or NaN where undefined; other values only with `numbers`.

    Raises
    ------
    ProbeError
        If there is no concept, one is repeated, is not in the store, or has other values than 0, 1 and NaN without `numbers`.
    """
    available = concept_columns(frame)
    if isinstance(concepts, str) or not concepts:
        msg = f"concepts must be a non-empty list; choose from {', '.join(available) or '(the store has none)'}"
        raise ProbeError(msg)
    unknown = [c for c in concepts if c not in available]
    if unknown:
        choices = ", ".join(available) or "(the store has no concepts)"
        msg = f"{_quoted(unknown)} not in store; choose from {choices}{nearest(unknown[0], available)}"
        raise ProbeError(msg)
    if len(set(concepts)) < len(concepts):
        msg = f"{_quoted([c for c in dict.fromkeys(concepts) if list(concepts).count(c) > 1])} repeated; give each concept once"
        raise ProbeError(msg)
    labels = frame[list(concepts)].to_numpy(dtype=np.float64, copy=True)
    free = np.array([numbers and ":" not in concept for concept in concepts])  # concept:value is yes or no
    invalid = np.where(free, np.isinf(labels), ~(np.isnan(labels) | (labels == 0) | (labels == 1)))
    if invalid.any():
        row, column = np.argwhere(invalid)[0]
        msg = (
            f"label '{concepts[column]}' of example '{frame['id'].iloc[row]}' is {labels[row, column]:g}: "
            f"{'numbers must be finite' if free[column] else 'labels are 1 (true), 0 (false) or NaN (undefined)'}"
        )
        raise ProbeError(msg)
    return labels


def read_features(
    store: ActivationSource, array: ProbedArray, layer: int, used: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Read a layer for the used rows, float32 [n, D]; a row whose token selection was empty is all NaN.

    Raises
    ------
    ProbeError
        If a row has some values that are not finite; the message names site and example.
    """
    site = array.site(layer)
    x = store.read(site, array.tokens, examples=used)
    invalid = ~np.isfinite(x).all(axis=1) & ~np.isnan(x).all(axis=1)
    if invalid.any():
        first = int(np.flatnonzero(invalid)[0])
        count = int((~np.isfinite(x[first])).sum())
        msg = (
            f"{site} at {array.tokens}: example '{ids[first]}' has {count} of {x.shape[1]} values that are not finite "
            f"({format_count(int(invalid.sum()), 'such example')}); trace in float32 or bfloat16, or exclude them with rows=…"
        )
        raise ProbeError(msg)
    return x


def check_support(
    concepts: Sequence[str], labels: np.ndarray, groups: np.ndarray, folds: int, test_fraction: float
) -> None:
    """Raise one `ProbeError` that lists all concepts that cannot be split by group: labels [N, K], groups [N]."""
    needed = groups_needed(folds, test_fraction)
    results = [support_problem(c, labels[:, k], groups, needed) for k, c in enumerate(concepts)]
    problems = [p for p in results if p]
    if problems:
        msg = (
            f"{'; '.join(problems)}. {folds} folds and a held-out share of {test_fraction:g} need "
            f"{format_count(needed, 'group')} of each class: exclude the concept, or set skip_unplaceable=True to fit "
            "the others; use fewer folds, or add data"
        )
        raise ProbeError(msg)


def probeable(
    store: ActivationSource,
    *,
    folds: int = 5,
    test_fraction: float = 0.3,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
) -> tuple[str, ...]:
    """Return the concepts of a store with enough groups of both classes for `fit_grid` with these settings.

    No token selection is given here, so rows that `fit_grid` would drop for an empty selection are counted.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import probeable
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> probeable(store), probeable(store, rows=np.arange(240) < 12)
    (('object:cat',), ())
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
