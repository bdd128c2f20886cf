"""A matrix of pushes by layer, for vLLM through hotwire-vllm, and for hidden-directions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mitigation.steering.export.capabilities import Ability, card_of, displacement, require
from mitigation.steering.export.convert import to_residual
from mitigation.steering.export.torch_files import write_pt
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

ABILITY = Ability("hotwire-vllm", "output of decoder layer l", ("residual",), positions=("all", "generated"))


def vllm(
    vector: SteeringVector, path: str | Path, model: Lvlm, strength: float | None = None, *, convert: bool = False
) -> Path:
    """Write a float32 tensor ``[layers, D]``, a row of zeros where nothing is added, to be used with scale 1.

    hotwire-vllm adds the row of a layer to that layer's output for the requests that ask for it
    (github.com/moudrkat/hotwire-vllm); hidden-directions keeps its directions in the same layout. The card beside the file
    holds the request's ``hotwire`` value: one specification for each layer, ``decode_only`` where the vector acts on
    generated tokens.

    Parameters
    ----------
    vector
        Additive, at residual streams, with positions ``all`` or ``generated``.
    path
        Of the ``.pt`` file; its stem is the vector's id in requests.
    model
        The model it was made for.
    strength
        In units of sigma; by default the vector's own.
    convert
        Carry heads and MLP outputs to the residual stream; the card says so.

    Raises
    ------
    ConfigError
        Where the format cannot express the vector.
    ModelError
        For a model that the vector was not made for.
    StoreError
        Where the file cannot be written.
    """
    vector.check(model)
    vector = to_residual(vector, model) if convert else vector
    require(vector, "vllm", ABILITY, convertible=not convert)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    matrix = torch.zeros(model.n_layers, model.width)
    for layer in vector.layers:
        matrix[layer] = torch.from_numpy(displacement(vector.entries[layer], s))
    path = Path(path)
    only = {"decode_only": True} if vector.positions == "generated" else {}
    request = [{"id": path.stem, "layer": layer, "scale": 1.0, **only} for layer in vector.layers]
    write_pt(path, matrix, card_of(vector, "vllm", s, hotwire=request), "vLLM vector")
    return path
