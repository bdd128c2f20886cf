"""The same push at another place: heads through the output projection, MLP outputs to the residual stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from circuits.head_screening.direct_logit import gate_of
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
    "approximate: what heads add was carried through the output projection and its gate, if there is one (gate W_O d), to the "
    "output of their block, so that the MLP of that block does not see it; test the converted vector"
)


def through_projection(model: Lvlm, head: Head, move: np.ndarray) -> np.ndarray:
    """Return ``W_O d``, float64 ``[D]``, of what is added to a head's z, ``[head_dim]``: at the projection's output."""
    columns = slice(head.head * model.head_dim, (head.head + 1) * model.head_dim)
    projection = model.head_projection(head.layer)
    held = weight(projection)  # which may be kept elsewhere until the layer runs
    held = projection.weight if held is None else held
    return held[:, columns].detach().double().cpu().numpy() @ move


def in_residual(model: Lvlm, head: Head, move: np.ndarray) -> np.ndarray:
    """Return what the residual stream gains by something added to a head's z: ``gate W_O d``, float64 ``[D]``.

    Raises
    ------
    ConfigError
        Where a norm stands between the projection and the residual stream (Gemma 2 and 3, PaliGemma 2, GLM-4V, Florence-2):
        what passes it depends on the input, so no one vector does the same.
    """
    spec = model.spec.decoder
    if spec.attention_post_norm or spec.cross_post_norm or spec.attention_out not in ("", spec.attention):
        norm = spec.attention_post_norm or spec.attention_out or spec.cross_post_norm
        msg = (
            f"{model.name}: attention is followed by a norm ('{norm}'), so what is added to head {head} arrives in the residual "
            "stream differently for each input: export it at the head, as 'baked' or 'safetensors', or derive it at a layer"
        )
        raise ConfigError(msg)
    return gate_of(model, replace(model.head_site(head.layer), component="attn_out")) * through_projection(
        model, head, move
    )


def to_residual(vector: SteeringVector, model: Lvlm) -> SteeringVector:
    """Return an additive vector whose pushes all arrive at the output of their blocks.

    From MLP outputs that is exact. What heads or an attention output add arrives after the MLP of the block instead of
    before it; the result's provenance says so under ``conversion``. A gate of the attention is part of what arrives.

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
        For a vector that is not the same push for every input, or one in the vision tower; at heads, or in a model that
        normalizes the residual stream itself, where a norm stands between the place and the residual stream.
    """
    vector.check(model)
    places = {place_of(key) for key in vector.entries}
    fit = places <= {"residual", "heads", "attention output", "MLP output"}
    if vector.kind != "add" or vector.norm != "free" or not fit:
        msg = f"{vector} cannot be carried to the residual stream: only a free addition in the decoder can"
        raise ConfigError(msg)
    if model.spec.decoder.mlp_post_norm and places - {"residual"}:
        msg = (
            f"{vector} cannot be carried to the residual stream: {model.name} normalizes the stream after attention and MLP, so "
            "what they add arrives differently for each input"
        )
        raise ConfigError(msg)
    moves: dict[int, np.ndarray] = {}
    for key, entry in vector.entries.items():
        move = displacement(entry, 1.0)
        layer = key if isinstance(key, int) else key.layer
        moves[layer] = moves.get(layer, np.zeros(model.width)) + (
            in_residual(model, key, move) if isinstance(key, Head) else move
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
