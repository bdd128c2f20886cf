"""The same push at another place: heads through the output projection, MLP outputs to the residual stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ConfigError
from lvlm.access.weights import weight
from lvlm.sites import Head
from mitigation.steering.export.capabilities import displacement, place_of
from mitigation.steering.placement import Entry, Key, name_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

EXACT = "exact: what the MLP adds to the residual stream was moved to where it arrives"
LATE = (
    "approximate: what heads add was carried through the output projection (W_O d) to the output of their block, so that "
    "the MLP of that block does not see it; test the converted vector"
)


def through_projection(model: Lvlm, head: Head, move: np.ndarray) -> np.ndarray:
    """Return ``W_O d``, float64 ``[D]``, of what is added to a head's z, ``[head_dim]``."""
    columns = slice(head.head * model.head_dim, (head.head + 1) * model.head_dim)
    projection = model.output_projection("decoder", head.layer)
    held = weight(projection)  # which may be kept elsewhere until the layer runs
    held = projection.weight if held is None else held
    return held[:, columns].detach().double().cpu().numpy() @ move


def to_residual(vector: SteeringVector, model: Lvlm) -> SteeringVector:
    """Return an additive vector whose pushes all arrive at the output of their blocks.

    From MLP outputs that is exact. What heads or an attention output add arrives after the MLP of the block instead of
    before it; the result's provenance says so under ``conversion``.

    Parameters
    ----------
    vector
        Of kind ``add`` with a free norm, in the decoder.
    model
        The model it was made for: its output projections are needed.

    Raises
    ------
    ModelError
        For a model that the vector was not made for.
    ConfigError
        For a vector that is not the same push for every input, or one in the vision tower.
    """
    vector.check(model)
    places = {place_of(key) for key in vector.entries}
    fit = places <= {"residual", "heads", "attention output", "MLP output"}
    if vector.kind != "add" or vector.norm != "free" or not fit:
        msg = f"{vector} cannot be carried to the residual stream: only a free addition in the decoder can"
        raise ConfigError(msg)
    moves: dict[int, np.ndarray] = {}
    for key, entry in vector.entries.items():
        move = displacement(entry, 1.0)
        layer = key if isinstance(key, int) else key.layer
        moves[layer] = moves.get(layer, np.zeros(model.width)) + (
            through_projection(model, key, move) if isinstance(key, Head) else move
        )
    entries: dict[Key, Entry] = {}
    for layer, move in moves.items():
        length = float(np.linalg.norm(move))
        if not length > 0:
            msg = f"at {name_of(layer)} nothing of {vector} arrives in the residual stream"
            raise ConfigError(msg)
        entries[layer] = Entry(move / length, length)
    how = LATE if places & {"heads", "attention output"} else EXACT
    return replace(vector, entries=entries, provenance={**vector.provenance, "conversion": how})
