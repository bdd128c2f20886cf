"""A grid's own split, found again on the store it was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError
from probes.protocol.inputs import Place, Store, find_place, read_features, read_groups, read_labels, row_mask
from probes.protocol.tasks import Rows, split_rows

if TYPE_CHECKING:
    import pandas as pd

    from probes.grid import ProbeGrid


@dataclass(frozen=True)
class Again:
    """Where a grid was fitted, and on which rows."""

    store: Store
    place: Place
    mask: np.ndarray
    """bool, of the store's examples: those used."""
    ids: np.ndarray
    present: np.ndarray
    """bool, of the rows used: those whose token selection was not empty."""
    table: Rows
    first: np.ndarray
    """The first layer's features, which had to be read."""

    def by_head(self, at: int) -> np.ndarray:
        """Read a layer by its place in the grid: float32 [n, H, D], H = 1 where layers are whole."""
        layer = self.place.layers[at]
        x = self.first if at == 0 else read_features(self.store, self.place, layer, self.mask, self.ids)
        return x[self.present].reshape(len(self.table.ids), self.place.n_heads or 1, -1)


def split_again(store: Store, grid: ProbeGrid, rows: Sequence[bool] | np.ndarray | pd.Series | None = None) -> Again:
    """Divide the rows as they were divided for the grid.

    Raises
    ------
    ProbeError
        Where the store is not the grid's, or `rows` gives other examples than `fit_grid` was given.
    """
    options = grid.provenance
    if store.digest != options["store"]:
        msg = f"the grid was fitted on store {options['store'][:12]}…, this one is {store.digest[:12]}…"
        raise ProbeError(msg)
    place = find_place(store, grid.stack, grid.component, grid.tokens, grid.n_heads is not None)
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    labels, ids, groups = (
        read_labels(frame, grid.concepts)[mask],
        frame["id"].to_numpy()[mask],
        read_groups(frame)[mask],
    )
    first = read_features(store, place, place.layers[0], mask, ids)
    present = np.asarray(~np.isnan(first).all(axis=1))
    table = split_rows(
        ids[present], groups[present], labels[present], options["folds"], options["test_fraction"], options["seed"]
    )
    if tuple(str(i) for i in table.ids[table.fold < 0]) != grid.held_out:
        msg = "these rows are not split as the grid's were: give the `rows` it was fitted with"
        raise ProbeError(msg)
    return Again(store, place, mask, ids, present, table, first)
