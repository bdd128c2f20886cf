"""Write a matrix of additions by layer, for vLLM through hotwire-vllm, and for hidden-directions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mitigation.steering.export.capability import Capability, metadata_of, require
from mitigation.steering.export.residual_conversion import to_residual
from mitigation.steering.export.torch_files import write_pt
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

CAPABILITY = Capability("hotwire-vllm", "output of decoder layer l", ("residual",), positions=("all", "generated:all"))


def vllm(
    vector: SteeringVector, path: str | Path, model: Lvlm, *, strength: float | None = None, convert: bool = False
) -> Path:
    """Write a float32 tensor ``[layers, D]``, with zeros for layers that are not steered, for use with scale 1.

    hotwire-vllm adds a layer's row to that layer's output for the requests that select it
    (github.com/moudrkat/hotwire-vllm); hidden-directions stores its directions in the same layout. The metadata file
    contains the request's ``hotwire`` value: one specification per layer, with ``decode_only`` if the vector acts on
    generated tokens.

    Parameters
    ----------
    vector
        Additive vector at residual streams, with positions ``all`` or ``generated:all``.
    path
        Path of the ``.pt`` file; its stem is the vector's id in requests.
    model
        The model that the vector was derived for.
    strength
        Strength in units of sigma; by default the vector's.
    convert
        Convert heads and MLP outputs to the residual stream; the metadata record it.

    Raises
    ------
    ConfigError
        If the format cannot represent the vector.
    ModelError
        For a model that the vector was not derived for.
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
    ...     path = gs.export.vllm(vector, Path(folder) / "vector.pt", model)
    ...     matrix = torch.load(path, weights_only=True)
    >>> matrix.shape == (model.n_layers, model.width), matrix[2, :3].tolist()
    (True, [3.0, 0.0, 0.0])
    """
    vector.check(model)
    vector = to_residual(vector, model) if convert else vector
    require(vector, "vllm", CAPABILITY, convertible=not convert)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    matrix = torch.zeros(model.n_layers, model.width)
    additions = vector.displacements(s)
    for layer in vector.layers:
        matrix[layer] = torch.from_numpy(additions[layer])
    path = Path(path)
    decode_only = {"decode_only": True} if vector.positions == "generated:all" else {}
    request = [{"id": path.stem, "layer": layer, "scale": 1.0, **decode_only} for layer in vector.layers]
    write_pt(path, matrix, metadata_of(vector, "vllm", s, hotwire=request), "vLLM vector")
    return path
