"""The baked format: additions to the biases of linear layers, so that serving code needs no hook.

Adding d to a head's z before the output projection equals adding ``W_O d`` after it (ITI's bake, arXiv 2306.03341);
adding d to a residual stream after a block equals adding it to the last linear layer of the block's MLP. A bias acts on
every token, so only a vector at all positions can be baked exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import ModelError
from lvlm.sites import Head
from mitigation.steering.export.capability import Capability, require
from mitigation.steering.export.end_of_mlp import end_of_mlp
from mitigation.steering.export.residual_conversion import through_projection
from mitigation.steering.places import name_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from torch import nn

    from lvlm.model import Lvlm

VERSION = 1
KIND = "bias_patch"
CAPABILITY = Capability("any Hugging Face code", "biases, so at every token", ("heads", "residual", "MLP output"))


def baked(vector: SteeringVector, path: str | Path, model: Lvlm, *, strength: float | None = None) -> Path:
    """Write an additive vector as changes of biases.

    Tensors have the names of the model's parameters (``….o_proj.bias``, ``….down_proj.bias``) and must be *added*; a
    missing bias counts as zeros. ``mitigation/steering/export/apply_bias.py`` adds them to any Hugging Face model; the file
    is self-contained, so copy it into serving code.

    Parameters
    ----------
    vector
        Additive vector at heads, residual streams or MLP outputs, with positions ``all``.
    path
        Path of the safetensors file.
    model
        The model that the vector was derived for; its weights are needed.
    strength
        Strength in units of sigma; by default the vector's.

    Raises
    ------
    ConfigError
        If a bias cannot represent the vector: another kind, or a residual stream after an MLP that does not end in a
        linear layer.
    ModelError
        For a model that the vector was not derived for.
    StoreError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import load_file
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> changes = {2: gs.AddChange(np.eye(model.width)[0], sigma=3.0)}
    >>> vector = gs.SteeringVector(changes, "all", 1.0, model.name, model.config_hash)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = gs.export.baked(vector, Path(folder) / "bias.safetensors", model)
    ...     sorted(load_file(path))
    ['model.language_model.layers.2.mlp.down_proj.bias']
    """
    vector.check(model)
    require(vector, "baked", CAPABILITY)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    names = {module: name for name, module in model.hf.named_modules()}
    deltas: dict[str, np.ndarray] = {}
    for key, delta in vector.displacements(s).items():
        if isinstance(key, Head):
            linear, addition = model.head_projection(key.layer), through_projection(model, key, delta)
        else:
            linear, addition = end_of_mlp(model, key if isinstance(key, int) else key.layer), delta
        name = f"{names[linear]}.bias"
        deltas[name] = deltas.get(name, np.zeros(len(addition))) + addition
    card = {
        "rule": "add each tensor to the parameter of its name; a bias that is not there is zero",
        "strength": s,
        "places": [name_of(key) for key in vector.changes],
        "model": vector.model,
        "config_hash": vector.config_hash,
        "provenance": dict(vector.provenance),
    }
    path = Path(path)
    artifacts.write(path, KIND, VERSION, {name: d.astype(np.float32) for name, d in deltas.items()}, card)
    return path


def apply(module: nn.Module, path: str | Path) -> Callable[[], None]:
    """Add a baked file's changes to a Hugging Face model in place; return a function that restores it bit for bit.

    Raises
    ------
    StoreError
        If the file is missing, damaged or of another kind.
    ModelError
        If the model lacks a module or it has another width; the model is then unchanged.
    """
    from mitigation.steering.export import apply_bias

    artifacts.read(Path(path), KIND, VERSION)
    try:
        return apply_bias.apply(module, path)
    except ValueError as error:
        raise ModelError(str(error)) from error
