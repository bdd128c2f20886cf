"""The baked format: what to add to the biases of the output projections, so that serving code needs no hook.

Adding d to a head's z before the output projection is adding ``W_O d`` after it (ITI's bake, arXiv 2306.03341). A
bias acts on every token, so only a vector at all positions can be baked without changing what it does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuits import files
from circuits.steering import SteeringVector
from concepts.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from lvlm.model import Lvlm

VERSION = 1
KIND = "bias_patch"


def baked(vector: SteeringVector, path: str | Path, model: Lvlm, strength: float | None = None) -> Path:
    """Write the bias changes that do what an additive vector at heads does.

    Tensors are named as the model's own parameters (``….o_proj.bias``) and are to be *added*; a projection without a
    bias has one of zeros.

    Parameters
    ----------
    vector
        Additive, at heads, with positions ``all``.
    path
        Of the safetensors file.
    model
        The model it was made for: its output projections are needed.
    strength
        In units of sigma; by default the vector's own.

    Raises
    ------
    ConfigError
        Where a bias cannot express the vector.
    ModelError
        For a model that the vector was not made for.
    StoreError
        Where the file cannot be written.
    """
    vector.check(model)
    if vector.kind != "add" or vector.layers:
        msg = f"{vector} cannot be baked into output projections: only directions at heads can; export it as 'safetensors'"
        raise ConfigError(msg)
    if vector.positions != "all":
        msg = (
            f"a bias acts on every token, this vector on positions '{vector.positions}': bake vector.at('all') and test "
            "that one, or export it as 'safetensors'"
        )
        raise ConfigError(msg)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    names = {module: name for name, module in model.hf.named_modules()}
    deltas: dict[str, np.ndarray] = {}
    for head in vector.heads:
        entry = vector.entries[head]
        projection = model.output_projection("decoder", head.layer)
        columns = slice(head.head * model.head_dim, (head.head + 1) * model.head_dim)
        weight = projection.weight[:, columns].detach().double().cpu().numpy()  # [D, head_dim]
        delta = weight @ (s * entry.sigma * entry.vector.astype(np.float64))
        name = f"{names[projection]}.bias"
        deltas[name] = deltas.get(name, np.zeros(len(delta))) + delta
    card = {
        "rule": "add each tensor to the parameter of its name; a bias that is not there is zero",
        "strength": s,
        "heads": [str(h) for h in vector.heads],
        "model": vector.model,
        "config_hash": vector.config_hash,
        "provenance": dict(vector.provenance),
    }
    path = Path(path)
    files.write(path, KIND, VERSION, {name: d.astype(np.float32) for name, d in deltas.items()}, card)
    return path


def apply(module: nn.Module, path: str | Path) -> None:
    """Add a baked file's changes to a Hugging Face model, in place.

    Raises
    ------
    StoreError
        Where the file is missing, damaged or something else.
    ModelError
        Where the model has no such module, or one of another width; then nothing was changed.
    """
    import torch
    from torch import nn

    tensors, _ = files.read(Path(path), KIND, VERSION)
    modules = dict(module.named_modules())
    found: list[tuple[nn.Linear, np.ndarray]] = []
    for name, delta in tensors.items():
        linear = modules.get(name.removesuffix(".bias"))
        if not isinstance(linear, nn.Linear) or linear.out_features != len(delta):
            msg = f"{path}: '{name}' [{len(delta)}] has no linear layer of that width in {type(module).__name__}"
            raise ModelError(msg)
        found.append((linear, delta))
    for linear, delta in found:
        change = torch.tensor(delta).to(linear.weight)
        old = linear.bias.detach() if linear.bias is not None else torch.zeros_like(change)
        linear.bias = nn.Parameter(old + change, requires_grad=False)
