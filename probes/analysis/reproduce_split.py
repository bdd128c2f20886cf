"""Reproduce a grid's split on the store that it was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError, SiteError
from probes.protocol.inputs import ProbedArray, find_array, read_features, read_groups, read_labels, row_mask
from probes.protocol.tasks import SplitRows, split_rows

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource
    from probes.grid import ProbeGrid


def grid_site(grid: ProbeGrid) -> str:
    """Return the `site` to pass to `fit_grid` to fit this grid again."""
    if len(grid.layers) == 1:
        return grid.site(grid.layers[0])
    # A named stack precedes the prefix of cross-attention: decoder.cross.z.
    return f"{grid.stack}.{grid.component}"


def grid_array(grid: ProbeGrid, store: ActivationSource, tokens: str | None = None) -> ProbedArray:
    """Find the array of a grid in a store, by default at the grid's token selection; raise `SiteError` if it has none."""
    array = find_array(store, grid_site(grid), tokens or grid.tokens, heads=grid.n_heads is not None)
    if array.head_numbers != grid.head_numbers and grid.n_heads:
        here, there = (", ".join(map(str, numbers)) for numbers in (grid.head_numbers, array.head_numbers))
        msg = f"the grid has heads {here} of {grid_site(grid)}, the store {there}; trace the same heads"
        raise SiteError(msg)
    return array


@dataclass(frozen=True)
class SplitSetup:
    """The array and rows that a grid was fitted on, with their split."""

    store: ActivationSource
    array: ProbedArray
    mask: np.ndarray
    """bool over the store's examples: the rows to use."""
    ids: np.ndarray
    present: np.ndarray
    """bool over the used rows: token selection not empty."""
    table: SplitRows
    first: np.ndarray
    """Features of the first layer."""

    def by_head(self, at: int) -> np.ndarray:
        """Read a layer by its index in the grid: float32 [n, H, D], H = 1 for probes on whole layers."""
        layer = self.array.layers[at]
        x = self.first if at == 0 else read_features(self.store, self.array, layer, self.mask, self.ids)
        return x[self.present].reshape(len(self.table.ids), self.array.n_heads or 1, -1)


def reproduce_split(
    grid: ProbeGrid, store: ActivationSource, rows: Sequence[bool] | np.ndarray | pd.Series | None = None
) -> SplitSetup:
    """Split the rows as for the grid.

    Raises
    ------
    ProbeError
        If the store is not the grid's, or `rows` selects other examples than in the call of `fit_grid`.
    """
    options = grid.provenance
    if store.digest != options["store"]:
        msg = f"the grid was fitted on store {options['store'][:12]}…, not on this store, {store.digest[:12]}…"
        raise ProbeError(msg)
    array = grid_array(grid, store)
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    labels, ids, groups = (
        read_labels(frame, grid.concepts, numbers=True)[mask],
        frame["id"].to_numpy()[mask],
        read_groups(frame)[mask],
    )
    first = read_features(store, array, array.layers[0], mask, ids)
    present = np.asarray(~np.isnan(first).all(axis=1))
    table = split_rows(
        ids[present], groups[present], labels[present], options["folds"], options["test_fraction"], options["seed"]
    )
    if tuple(str(i) for i in table.ids[table.fold < 0]) != grid.held_out:
        msg = "these rows are not split as the grid's were; use the same `rows` as in fit_grid"
        raise ProbeError(msg)
    return SplitSetup(store, array, mask, ids, present, table, first)
