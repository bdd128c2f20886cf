"""One picture of a concept's way through the model: vision tower, projector, decoder, in the order things happen."""

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
    """Put the frames of several grids one after the other, in the order of the forward pass.

    Grids may be of any stacks, components and token selections. Added to the columns of `ProbeGrid.frame`: ``place``
    (``vision.L3.resid_post``) and ``step``, its number along the way, the same for all selections at a site.

    Raises
    ------
    ProbeError
        Where no grid is given.
    """
    import pandas as pd

    parts = []
    for grid in grids:
        part = grid.frame()
        part.insert(0, "place", [grid.site(int(layer)) for layer in part["layer"]])
        parts.append(part)
    if not parts:
        msg = "give at least one grid"
        raise ProbeError(msg)
    table = pd.concat(parts, ignore_index=True)
    depth = [STACKS.index(stack) for stack in table["stack"]]
    order = pd.MultiIndex.from_arrays([depth, table["layer"]])
    table.insert(1, "step", order.factorize(sort=True)[0])
    return table.sort_values(["step", "component", "tokens", "concept", "head"], kind="stable", ignore_index=True)


def landmarks(table: pd.DataFrame, *, above: float = 0.5, score: str = "low") -> pd.DataFrame:
    """Say where each concept appears and where it vanishes, at each component and token selection of a `journey`.

    It appears at the first place where the score (by default the lower end of the interval) is over `above`, in any head,
    and vanishes at the first later place from which on it never is again.

    Returns
    -------
    A row a concept, component and tokens: appears, vanishes (both missing where they never happen), best place and its
    balanced accuracy.
    """
    import pandas as pd

    rows = []
    parts: Any = table.groupby(["concept", "component", "tokens"], sort=True)
    for keys, part in parts:
        by_place = part.groupby(["step", "place"], sort=True)[[score, "balanced_accuracy"]].max().reset_index()
        there = [at for at, value in enumerate(by_place[score]) if value > above]
        places = list(by_place["place"])
        best = int(by_place["balanced_accuracy"].to_numpy().argmax())
        appears = places[there[0]] if there else None
        vanishes = places[there[-1] + 1] if there and there[-1] + 1 < len(places) else None
        top = float(by_place["balanced_accuracy"].iloc[best])
        rows.append((*(keys if isinstance(keys, tuple) else (keys,)), appears, vanishes, places[best], top))
    columns = ["concept", "component", "tokens", "appears", "vanishes", "best", "balanced_accuracy"]
    return pd.DataFrame(rows, columns=columns)
