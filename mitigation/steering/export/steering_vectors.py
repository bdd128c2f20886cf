"""What the package steering-vectors builds its `SteeringVector` from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from groundscope.core.errors import ModelError
from mitigation.steering.export.capabilities import Ability, card_of, displacement, require
from mitigation.steering.export.convert import through_projection, to_residual
from mitigation.steering.export.torch_files import write_pt
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from torch import nn

    from lvlm.model import Lvlm

ABILITY = Ability("steering-vectors", "output of a layer, at every token", ("residual",))


def steering_vectors(
    vector: SteeringVector, path: str | Path, model: Lvlm, strength: float | None = None, *, convert: bool = False
) -> Path:
    """Write ``layer_activations``, ``layer_type`` and ``layer_config`` for steering-vectors, to be used with multiplier 1.

    ::

        told = torch.load(path, weights_only=True)
        vector = SteeringVector(told["layer_activations"], told["layer_type"])
        with vector.apply(model, layer_config=told["layer_config"]): ...

    The layer pattern goes with it: the package's guess takes the vision tower of some models for their decoder.

    Parameters
    ----------
    vector
        Additive, at residual streams, with positions ``all``.
    path
        Of the ``.pt`` file.
    model
        The model it was made for.
    strength
        In units of sigma; by default the vector's own.
    convert
        A vector at heads alone is written as ``W_O d`` at the output projections, which is exact; with other places among
        them, everything is carried to the residual stream. The card says which.

    Raises
    ------
    ConfigError
        Where the format cannot express the vector.
    ModelError
        For a model that the vector was not made for, or whose layers have no common pattern of names.
    StoreError
        Where the file cannot be written.
    """
    vector.check(model)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    at_heads = convert and len(vector.heads) == len(vector.entries)
    rows: dict[int, torch.Tensor] = {}
    if at_heads:
        # The rest must fit: positions, kind, schedule.
        require(vector, "steering_vectors", Ability(ABILITY.consumer, ABILITY.applied, ("heads",)))
        for head in vector.heads:
            move = torch.from_numpy(through_projection(model, head, displacement(vector.entries[head], s)))
            rows[head.layer] = rows[head.layer] + move if head.layer in rows else move
        kind = "self_attn"
        pattern = _pattern(model, [model.head_projection(i) for i in range(model.n_layers)])
        how = {"conversion": "exact: W_O d at the output of the output projection"}
    else:
        vector = to_residual(vector, model) if convert else vector
        require(vector, "steering_vectors", ABILITY, convertible=not convert)
        rows = {layer: torch.from_numpy(displacement(vector.entries[layer], s)) for layer in vector.layers}
        kind, how = "decoder_block", {}
        pattern = _pattern(model, list(model.layers("decoder")))
    content = {
        "layer_activations": {layer: row.float() for layer, row in rows.items()},
        "layer_type": kind,
        "layer_config": {kind: pattern},
    }
    path = Path(path)
    card = card_of(vector, "steering_vectors", s, layer_type=kind, layer_config={kind: pattern}, **how)
    write_pt(path, content, card, "steering-vectors file")
    return path


def _pattern(model: Lvlm, modules: list[nn.Module]) -> str:
    """Return the names of modules, one a layer, with ``{num}`` in the place of the layer's number."""
    names = {module: name for name, module in model.hf.named_modules()}
    found = [names[module].split(".") for module in modules]
    for place, part in enumerate(found[0]):
        pattern = ".".join([*found[0][:place], "{num}", *found[0][place + 1 :]])
        if part == "0" and all(".".join(name) == pattern.format(num=i) for i, name in enumerate(found)):
            return pattern
    msg = (
        f"{model.name}: its layers are called {'.'.join(found[0])}, {'.'.join(found[-1])}: no one pattern with a number"
    )
    raise ModelError(msg)
