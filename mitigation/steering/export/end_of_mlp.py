"""The linear layer whose output is the output of a block's MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lvlm.model import Lvlm


def end_of_mlp(model: Lvlm, layer: int) -> nn.Linear:
    """Return the linear layer whose output is the output of a block's MLP; raises `ConfigError` if there is no such layer.

    The MLP is run on noise, because names differ between families and an MLP may have operations after its last linear layer.
    """
    import torch
    from torch import nn

    place = model.place("decoder", layer, "mlp_out")
    if isinstance(place.module, nn.Linear):
        return place.module
    outputs: list[tuple[nn.Linear, torch.Tensor]] = []

    def record(linear: Any, _inputs: Any, out: Any) -> None:
        outputs.append((linear, out))

    linears = [m for m in place.module.modules() if isinstance(m, nn.Linear) and m.out_features == model.width]
    hooks = [m.register_forward_hook(record) for m in linears]
    noise = torch.randn(1, 3, model.width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            mlp_output = place.module(noise.to(model.device, model.dtype))
    except (TypeError, RuntimeError, ValueError):
        mlp_output = None  # the MLP needs other inputs besides hidden states
    finally:
        for hook in hooks:
            hook.remove()
    last_layers = [
        m
        for m, out in outputs
        if isinstance(mlp_output, torch.Tensor) and torch.equal(out.reshape(mlp_output.shape), mlp_output)
    ]
    if place.gate is not None or place.third is not None or len(last_layers) != 1:
        msg = (
            f"{model.name}: the MLP of layer {layer} ({type(place.module).__name__}) does not end in one linear layer whose "
            f"bias could contain an addition to the residual stream; export the vector as 'safetensors'"
        )
        raise ConfigError(msg)
    return last_layers[0]
