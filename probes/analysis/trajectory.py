"""The decodability of a concept through the model: vision tower, projector, decoder, in the order of computation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from groundscope.core.errors import ProbeError
from probes.grid import ProbeGrid

if TYPE_CHECKING:
    import pandas as pd

STACKS = ("vision", "projector", "decoder")
"""In the order of the forward pass."""


def layer_trajectory(grids: Iterable[ProbeGrid]) -> pd.DataFrame:
    """Concatenate the frames of several grids in the order of the forward pass.

    Grids can have any stacks, components and token selections. Columns are those of `ProbeGrid.frame` and ``place``
    (``vision.L3.resid_post``) and ``step``, its index in the forward pass, equal for all selections at a site.

    Raises
    ------
    ProbeError
        If there is no grid.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import fit_grid, layer_trajectory
    >>> cat = np.arange(120) % 2
    >>> x = np.random.default_rng(0).normal(size=(120, 1, 8)) + 2.0 * cat[:, None, None]
    >>> table = {"id": range(120), "group": range(120), "object:cat": cat}
    >>> store = MemorySource({"resid_post": x, "vision.resid_post": x, "projector.out": x}, table)
    >>> sites = ("resid_post", "projector.out", "vision.resid_post")
    >>> grids = [fit_grid(store, ["object:cat"], site, C=(0.1,), folds=2, control=0, resamples=2) for site in sites]
    >>> layer_trajectory(grids)[["place", "step", "balanced_accuracy"]].round(2)
                       place  step  balanced_accuracy
    0   vision.L0.resid_post     0                1.0
    1          projector.out     1                1.0
    2  decoder.L0.resid_post     2                1.0
    """
    import pandas as pd

    parts = []
    for grid in grids:
        part = grid.frame()
        part.insert(0, "place", [grid.site(int(layer)) for layer in part["layer"]])
        parts.append(part)
    if not parts:
        msg = "no grid to combine; give at least one grid"
        raise ProbeError(msg)
    table = pd.concat(parts, ignore_index=True)
    depth = [STACKS.index(stack) for stack in table["stack"]]
    order = pd.MultiIndex.from_arrays([depth, table["layer"]])
    table.insert(1, "step", order.factorize(sort=True)[0])
    return table.sort_values(["step", "component", "tokens", "concept", "head"], kind="stable", ignore_index=True)


def find_onsets(table: pd.DataFrame, *, above: float = 0.5, score: str = "low") -> pd.DataFrame:
    """Return where each concept appears and where it vanishes, at each component and token selection of a `layer_trajectory`.

    It appears at the first place where the score (by default the lower end of the interval) exceeds `above` in any head,
    and vanishes at the place after the last such place.

    Returns
    -------
    One row per concept, component and tokens: appears, vanishes (missing if they do not occur), best place and its balanced
    accuracy.

    Examples
    --------
    >>> import pandas as pd
    >>> from probes import find_onsets
    >>> table = pd.DataFrame({"concept": "object:cat", "component": "resid_post", "tokens": "last", "step": [0, 1, 2, 3]})
    >>> table["place"] = [f"decoder.L{layer}.resid_post" for layer in table["step"]]
    >>> table["low"] = [0.4, 0.6, 0.7, 0.45]
    >>> table["balanced_accuracy"] = [0.5, 0.7, 0.8, 0.55]
    >>> find_onsets(table)[["appears", "vanishes", "best"]].loc[0].tolist()
    ['decoder.L1.resid_post', 'decoder.L3.resid_post', 'decoder.L2.resid_post']
    """
    import pandas as pd

    rows = []
    parts: Any = table.groupby(["concept", "component", "tokens"], sort=True)
    for keys, part in parts:
        by_place = part.groupby(["step", "place"], sort=True)[[score, "balanced_accuracy"]].max().reset_index()
        above_threshold = [at for at, value in enumerate(by_place[score]) if value > above]
        places = list(by_place["place"])
        best = int(by_place["balanced_accuracy"].to_numpy().argmax())
        appears = places[above_threshold[0]] if above_threshold else None
        last = above_threshold[-1] if above_threshold else len(places)
        vanishes = places[last + 1] if last + 1 < len(places) else None
        top = float(by_place["balanced_accuracy"].iloc[best])
        rows.append((*(keys if isinstance(keys, tuple) else (keys,)), appears, vanishes, places[best], top))
    columns = ["concept", "component", "tokens", "appears", "vanishes", "best", "balanced_accuracy"]
    return pd.DataFrame(rows, columns=columns)
