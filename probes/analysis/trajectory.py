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


def journey(grids: Iterable[ProbeGrid]) -> pd.DataFrame:
    """Concatenate the frames of several grids in the order of the forward pass.

    Grids can have any stacks, components and token selections. Columns are those of `ProbeGrid.frame` and ``place``
    (``vision.L3.resid_post``) and ``step``, its index in the forward pass, equal for all selections at a site.

    Raises
    ------
    ProbeError
        If there is no grid.
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


def landmarks(table: pd.DataFrame, *, above: float = 0.5, score: str = "low") -> pd.DataFrame:
    """Return where each concept appears and where it vanishes, at each component and token selection of a `journey`.

    It appears at the first place where the score (by default the lower end of the interval) exceeds `above` in any head,
    and vanishes at the place after the last such place.

    Returns
    -------
    One row per concept, component and tokens: appears, vanishes (missing if they do not occur), best place and its balanced
    accuracy.
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
