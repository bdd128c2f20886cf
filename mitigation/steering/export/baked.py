"""The baked format: what to add to the biases of linear layers, so that serving code needs no hook.

Adding d to a head's z before the output projection is adding ``W_O d`` after it (ITI's bake, arXiv 2306.03341); adding d
to a residual stream after a block is adding it to the last linear layer of the block's MLP. A bias acts on every token,
so only a vector at all positions can be baked without changing what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, ModelError
from lvlm.sites import Head
from mitigation.steering.export.capabilities import Ability, displacement, require
from mitigation.steering.export.convert import through_projection
from mitigation.steering.placement import name_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from torch import nn

    from lvlm.model import Lvlm

VERSION = 1
KIND = "bias_patch"
ABILITY = Ability("any Hugging Face code", "biases, so at every token", ("heads", "residual", "MLP output"))


def baked(vector: SteeringVector, path: str | Path, model: Lvlm, strength: float | None = None) -> Path:
    """Write the bias changes that do what an additive vector does.

    Tensors are named as the model's own parameters (``….o_proj.bias``, ``….down_proj.bias``) and are to be *added*; a
    layer without a bias has one of zeros. ``mitigation/steering/export/apply_bias.py`` puts them into any Hugging Face model; it
    stands alone, to be copied beside serving code.

    Parameters
    ----------
    vector
        Additive, at heads, residual streams or MLP outputs, with positions ``all``.
    path
        Of the safetensors file.
    model
        The model it was made for: its weights are needed.
    strength
        In units of sigma; by default the vector's own.

    Raises
    ------
    ConfigError
        Where a bias cannot express the vector: another kind, a residual stream whose MLP does not end in a linear layer.
    ModelError
        For a model that the vector was not made for.
    StoreError
        Where the file cannot be written.
    """
    vector.check(model)
    require(vector, "baked", ABILITY)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    names = {module: name for name, module in model.hf.named_modules()}
    deltas: dict[str, np.ndarray] = {}
    for key, entry in vector.entries.items():
        delta = displacement(entry, s)
        if isinstance(key, Head):
            linear, delta = model.head_projection(key.layer), through_projection(model, key, delta)
        else:
            linear = _end_of_mlp(model, key if isinstance(key, int) else key.layer)
        name = f"{names[linear]}.bias"
        deltas[name] = deltas.get(name, np.zeros(len(delta))) + delta
    card = {
        "rule": "add each tensor to the parameter of its name; a bias that is not there is zero",
        "strength": s,
        "places": [name_of(key) for key in vector.entries],
        "model": vector.model,
        "config_hash": vector.config_hash,
        "provenance": dict(vector.provenance),
    }
    path = Path(path)
    artifacts.write(path, KIND, VERSION, {name: d.astype(np.float32) for name, d in deltas.items()}, card)
    return path


def apply(module: nn.Module, path: str | Path) -> Callable[[], None]:
    """Add a baked file's changes to a Hugging Face model, in place, and return what takes them back bit for bit.

    Raises
    ------
    StoreError
        Where the file is missing, damaged or something else.
    ModelError
        Where the model has no such module, or one of another width; then nothing was changed.
    """
    from mitigation.steering.export import apply_bias

    artifacts.read(Path(path), KIND, VERSION)
    try:
        return apply_bias.apply(module, path)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _end_of_mlp(model: Lvlm, layer: int) -> nn.Linear:
    """Return the linear layer whose output is all that a block's MLP adds; raises `ConfigError` where there is none.

    Found by running the MLP on noise: names differ from family to family, and an MLP may go on after its last linear layer.
    """
    import torch
    from torch import nn

    place = model.place("decoder", layer, "mlp_out")
    if isinstance(place.module, nn.Linear):
        return place.module
    seen: list[tuple[nn.Linear, torch.Tensor]] = []

    def note(linear: Any, _inputs: Any, out: Any) -> None:
        seen.append((linear, out))

    linears = [m for m in place.module.modules() if isinstance(m, nn.Linear) and m.out_features == model.width]
    hooks = [m.register_forward_hook(note) for m in linears]
    noise = torch.randn(1, 3, model.width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            whole = place.module(noise.to(model.device, model.dtype))
    except (TypeError, RuntimeError, ValueError):
        whole = None  # it takes more than hidden states
    finally:
        for hook in hooks:
            hook.remove()
    found = [m for m, out in seen if isinstance(whole, torch.Tensor) and torch.equal(out.reshape(whole.shape), whole)]
    if place.gate is not None or place.third is not None or len(found) != 1:
        msg = (
            f"{model.name}: the MLP of layer {layer} ({type(place.module).__name__}) does not end in one linear layer whose "
            f"bias could hold a push to the residual stream; export it as 'safetensors'"
        )
        raise ConfigError(msg)
    return found[0]
