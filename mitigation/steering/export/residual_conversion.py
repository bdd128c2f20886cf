"""Convert a vector to another place: heads through the output projection, MLP outputs to the residual stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from circuits.head_screening.direct_logit import gate_of
from groundscope.core.errors import ConfigError
from lvlm.access.weights import columns
from lvlm.sites import Head
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.export.capability import place_of
from mitigation.steering.places import Key, name_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

EXACT = "exact: what the MLP adds to the residual stream was moved to where it arrives"
LATE = (
    "approximate: what heads add was carried through the output projection and its gate, if there is one (gate W_O d), to the "
    "output of their block, so that the MLP of that block does not see it; test the converted vector"
)


def through_projection(model: Lvlm, head: Head, move: np.ndarray) -> np.ndarray:
    """Return ``W_O d`` at the projection's output, float64 ``[D]``, for an addition d to a head's z, ``[head_dim]``."""
    which = slice(head.head * model.head_dim, (head.head + 1) * model.head_dim)
    inputs = torch.empty(0, dtype=model.dtype, device=model.device)
    with torch.no_grad():  # the matrix may be offloaded until the layer runs, or quantized
        matrix = columns(model.head_projection(head.layer), which, inputs)
    return matrix.detach().double().cpu().numpy() @ move


def in_residual(model: Lvlm, head: Head, move: np.ndarray) -> np.ndarray:
    """Return the change of the residual stream caused by an addition to a head's z: ``gate W_O d``, float64 ``[D]``.

    Raises
    ------
    ConfigError
        If a norm lies between the projection and the residual stream (Gemma 2 and 3, PaliGemma 2, GLM-4V, Florence-2): its
        output depends on the input, so no constant vector is equivalent.
    """
    spec = model.spec.decoder
    if spec.attention_post_norm or spec.cross_post_norm or spec.attention_out not in ("", spec.attention):
        norm = spec.attention_post_norm or spec.attention_out or spec.cross_post_norm
        msg = (
            f"{model.name}: attention is followed by a norm ('{norm}'), so an addition to head {head} changes the residual "
            "stream differently for each input; export it at the head, as 'baked' or 'safetensors', or derive it at a layer"
        )
        raise ConfigError(msg)
    return gate_of(model, replace(model.head_site(head.layer), component="attn_out")) * through_projection(
        model, head, move
    )


def to_residual(vector: SteeringVector, model: Lvlm) -> SteeringVector:
    """Return an additive vector that adds everything at the outputs of its blocks.

    For MLP outputs the conversion is exact. Additions of heads or attention outputs move from before the block's MLP to
    after it; the result's provenance records this under ``conversion``. A gate of the attention is included.

    Parameters
    ----------
    vector
        Vector of kind ``add`` with norm ``free``, in the decoder.
    model
        The model that the vector was derived for; its output projections are needed.

    Raises
    ------
    ModelError
        For a model that the vector was not derived for.
    ConfigError
        For a vector that does not add the same to every input, or acts in the vision tower; also if a norm lies between
        the place and the residual stream.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> from mitigation.steering.export.residual_conversion import to_residual
    >>> model = gs.load_lvlm("tiny")
    >>> changes = {"L3.H1": gs.AddChange(np.eye(model.head_dim)[0])}
    >>> to_residual(gs.SteeringVector(changes, "all", 1.0, model.name, model.config_hash), model)
    SteeringVector(add at L3; all, strength 1, for 'tiny')
    """
    vector.check(model)
    places = {place_of(key) for key in vector.changes}
    convertible = places <= {"residual", "heads", "attention output", "MLP output"}
    if vector.kind != "add" or vector.norm != "free" or not convertible:
        msg = (
            f"{vector} cannot be converted to the residual stream; only kind 'add' with norm 'free' in the decoder can"
        )
        raise ConfigError(msg)
    if model.spec.decoder.mlp_post_norm and places - {"residual"}:
        msg = (
            f"{vector} cannot be converted to the residual stream: {model.name} normalizes the stream after attention and MLP, "
            "so an addition there has a different effect for each input"
        )
        raise ConfigError(msg)
    moves: dict[int, np.ndarray] = {}
    for key, move in vector.displacements(1.0).items():
        layer = key if isinstance(key, int) else key.layer
        moves[layer] = moves.get(layer, np.zeros(model.width)) + (
            in_residual(model, key, move) if isinstance(key, Head) else move
        )
    changes: dict[Key, VectorChange] = {}
    for layer, move in moves.items():
        length = float(np.linalg.norm(move))
        if not length > 0:
            msg = f"at {name_of(layer)} {vector} does not change the residual stream"
            raise ConfigError(msg)
        changes[layer] = AddChange(move / length, length)
    conversion = LATE if places & {"heads", "attention output"} else EXACT
    return replace(vector, changes=changes, provenance={**vector.provenance, "conversion": conversion})
