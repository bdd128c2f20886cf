"""Which layers have self-attention and cross-attention, and the output projection of their heads."""

from __future__ import annotations

from torch import nn

from groundscope.core.errors import ModelError
from lvlm.family.specification import find, resolve
from lvlm.interfaces import Model
from lvlm.sites import Site


def has_attention(model: Model, stack: str, layer: int, *, cross: bool) -> bool:
    """Whether a layer has self-attention, or cross-attention."""
    spec = model.spec.stack(stack)
    path = spec.cross_attention if cross else spec.attention
    if not path:
        return False
    layers = model.layers(stack)
    # If no layer has the path, the spec is wrong, and the hook point of a site names the path.
    return find(layers[layer], path) is not None or not any(find(other, path) is not None for other in layers)


def head_site(model: Model, layer: int) -> Site:
    """Return the site of a decoder layer's heads: in its self-attention, or in its only attention, cross-attention."""
    has_self_attention = has_attention(model, "decoder", layer, cross=False)
    cross = not has_self_attention and has_attention(model, "decoder", layer, cross=True)
    return Site("decoder", layer, "z", cross=cross)


def output_projection(model: Model, stack: str, layer: int, *, cross: bool = False) -> nn.Linear:
    """Return the linear map from a layer's heads to its attention output; raises `ModelError` for another module."""
    spec = model.spec.stack(stack)
    path = spec.cross_output_projection if cross else spec.output_projection
    module = resolve(model.layers(stack)[layer], path, model.spec)
    if not isinstance(module, nn.Linear):
        msg = f"'{path}' is a {type(module).__name__}, not a linear layer"
        raise ModelError(msg)
    return module
