"""From the name of a site to its place in a model, by the family's spec."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from groundscope.core.errors import SiteError
from lvlm.access.hook_point import Place
from lvlm.family.discovery import bare
from lvlm.family.specification import FamilySpec, StackSpec, find, resolve
from lvlm.sites import CROSS_COMPONENTS, Site, Stack

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def find_place(model: Lvlm, stack: str, layer: int, component: str, *, cross: bool) -> Place:
    """Return where a component of a layer is read; raises `SiteError` for one that the model lacks."""
    name = str(Site(cast("Stack", stack), layer, cast("Any", component), cross=cross))
    if stack == "projector":
        if not model.spec.projector:
            msg = f"site '{name}': {model.name} ({model.spec.model_type}) has no projector{_why(model.spec)}"
            raise SiteError(msg)
        return Place(resolve(model.hf, model.spec.projector, model.spec), "output")
    count = len(model.layers(stack))
    if not 0 <= layer < count:
        there = (
            f"has {stack} layers 0-{count - 1}"
            if count
            else f"has no {stack} layers that can be read{_why(model.spec)}"
        )
        msg = f"site '{name}': {model.name} {there}"
        raise SiteError(msg)
    spec, module = model.spec.stack(stack), model.layers(stack)[layer]
    if cross and component not in CROSS_COMPONENTS:
        msg = f"site '{name}': of cross-attention there are {', '.join(CROSS_COMPONENTS)}"
        raise SiteError(msg)
    if component in CROSS_COMPONENTS and not model.attends(stack, layer, cross=cross):
        having = [n for n in range(count) if model.attends(stack, n, cross=cross)]
        what = "cross-attention" if cross else "self-attention"
        msg = f"site '{name}': {model.name} has no {what} in this layer; layers that have it: {having or 'none'}"
        if cross and not having:
            msg = f"site '{name}': {model.name} has no cross-attention layers"
        raise SiteError(msg)
    heads = model.n_heads if stack == "decoder" else model.n_vision_heads
    place = _in_layer(model.spec, spec, module, component, heads, cross=cross)
    if not spec.layout:
        return place
    side = find(module, spec.window) if spec.window and component in {"z", "q", "k", "v"} else None
    return replace(place, layout=spec.layout, window=int(side or 0), layer=module)


def _in_layer(
    family: FamilySpec, spec: StackSpec, layer: nn.Module, component: str, heads: int, *, cross: bool
) -> Place:
    def at(path: str) -> nn.Module:
        return resolve(layer, path, family)

    attention = spec.cross_attention if cross else spec.attention
    match component:
        case "resid_pre":
            return Place(layer, "input")
        case "resid_post":
            return Place(layer, "output")
        case "resid_mid":
            return Place(at(spec.mid_norm), "input", layer=layer)
        case "z":
            return Place(at(spec.cross_output_projection if cross else spec.output_projection), "input")
        case "attn_out":
            gate = _gate(layer, spec.cross_gate if cross else spec.attention_gate)
            path = attention if cross else spec.attention_out or attention
            return Place(at(path), "output", gate=gate[0], tanh=gate[1])
        case "mlp_out":
            gate = _gate(layer, spec.mlp_gate)
            return Place(
                at(spec.mlp_out or spec.mlp),
                "output",
                gate=gate[0],
                tanh=gate[1],
                layer=layer,
                row_mask=spec.mlp_row_mask if gate[0] is not None else "",
            )
        case "pattern":
            return Place(at(attention), "output", element=spec.weights)
        case _:
            paths = (
                {"q": spec.cross_query, "k": spec.cross_key, "v": spec.cross_value}
                if cross
                else {"q": spec.query, "k": spec.key, "v": spec.value}
            )
            path, _, third = paths[component].partition("#")
            third, _, by_head = third.partition("/")
            return Place(at(path), "output", third=int(third) if third else None, heads=heads if by_head else 0)


def _why(spec: FamilySpec) -> str:
    return f": {spec.lacks}" if spec.lacks else ""


def _gate(layer: nn.Module, name: str) -> tuple[nn.Parameter | None, bool]:
    """Return a layer's gate and whether its hyperbolic tangent is meant; (None, False) for a layer without."""
    found = find(layer, bare(name)) if name else None
    return (found, name.startswith("tanh(")) if isinstance(found, nn.Parameter) else (None, False)
