"""Write a file for the package steering-vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from groundscope.core.errors import ModelError
from mitigation.steering.export.capability import Capability, metadata_of, require, require_vector
from mitigation.steering.export.residual_conversion import through_projection, to_residual
from mitigation.steering.export.torch_files import write_pt
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from torch import nn

    from lvlm.model import Lvlm

CAPABILITY = Capability("steering-vectors", "output of a layer, at every token", ("residual",))


def steering_vectors(
    vector: SteeringVector, path: str | Path, model: Lvlm, *, strength: float | None = None, convert: bool = False
) -> Path:
    """Write ``layer_activations``, ``layer_type`` and ``layer_config`` for steering-vectors, for use with multiplier 1.

    ::

        content = torch.load(path, weights_only=True)
        vector = SteeringVector(content["layer_activations"], content["layer_type"])
        with vector.apply(model, layer_config=content["layer_config"]): ...

    The layer pattern is included because the package's guess selects the vision tower instead of the decoder in some models.

    Parameters
    ----------
    vector
        Additive vector at residual streams, with positions ``all``.
    path
        Path of the ``.pt`` file.
    model
        The model that the vector was derived for.
    strength
        Strength in units of sigma; by default the vector's.
    convert
        A vector at heads only is written as ``W_O d`` at the output projections, which is exact; a vector with other
        places is converted to the residual stream. The metadata record which.

    Raises
    ------
    ConfigError
        If the format cannot represent the vector.
    ModelError
        For a model that the vector was not derived for, or whose layer names have no common pattern.
    StoreError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, torch
    >>> import numpy as np
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> changes = {2: gs.AddChange(np.eye(model.width)[0], sigma=3.0)}
    >>> vector = gs.SteeringVector(changes, "all", 1.0, model.name, model.config_hash)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = gs.export.steering_vectors(vector, Path(folder) / "vector.pt", model)
    ...     content = torch.load(path, weights_only=True)
    >>> content["layer_type"], content["layer_activations"][2][:3].tolist()
    ('decoder_block', [3.0, 0.0, 0.0])
    """
    vector.check(model)
    require_vector(vector, "steering_vectors", CAPABILITY)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    at_heads = convert and len(vector.heads) == len(vector.changes)
    rows: dict[int, torch.Tensor] = {}
    if at_heads:
        # Positions, kind and schedule must be supported too.
        require(vector, "steering_vectors", Capability(CAPABILITY.consumer, CAPABILITY.effect, ("heads",)))
        additions = vector.displacements(s)
        for head in vector.heads:
            move = torch.from_numpy(through_projection(model, head, additions[head]))
            rows[head.layer] = rows[head.layer] + move if head.layer in rows else move
        kind = "self_attn"
        pattern = _pattern(model, [model.head_projection(i) for i in range(model.n_layers)])
        conversion = {"conversion": "exact: W_O d at the output of the output projection"}
    else:
        vector = to_residual(vector, model) if convert else vector
        require(vector, "steering_vectors", CAPABILITY, convertible=not convert)
        additions = vector.displacements(s)
        rows = {layer: torch.from_numpy(additions[layer]) for layer in vector.layers}
        kind, conversion = "decoder_block", {}
        pattern = _pattern(model, list(model.layers("decoder")))
    content = {
        "layer_activations": {layer: row.float() for layer, row in rows.items()},
        "layer_type": kind,
        "layer_config": {kind: pattern},
    }
    path = Path(path)
    card = metadata_of(vector, "steering_vectors", s, layer_type=kind, layer_config={kind: pattern}, **conversion)
    write_pt(path, content, card, "steering-vectors file")
    return path


def _pattern(model: Lvlm, modules: list[nn.Module]) -> str:
    """Return the common name of modules, one per layer, with ``{num}`` in place of the layer's number."""
    names = {module: name for name, module in model.hf.named_modules()}
    parts_of_name = [names[module].split(".") for module in modules]
    for place, part in enumerate(parts_of_name[0]):
        pattern = ".".join([*parts_of_name[0][:place], "{num}", *parts_of_name[0][place + 1 :]])
        if part == "0" and all(".".join(name) == pattern.format(num=i) for i, name in enumerate(parts_of_name)):
            return pattern
    first, last = ".".join(parts_of_name[0]), ".".join(parts_of_name[-1])
    msg = f"{model.name}: the layer names {first} and {last} have no common pattern with a number"
    raise ModelError(msg)
