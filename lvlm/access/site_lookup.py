"""Find the sites that a name means, and the hook point of a site, by the family's spec."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from groundscope.core.errors import SiteError
from lvlm.access.hook_point import HookPoint
from lvlm.family.module_detection import bare
from lvlm.family.specification import FamilySpec, StackSpec, find, resolve
from lvlm.interfaces import Model
from lvlm.sites import CROSS_COMPONENTS, Component, Site, parse_component


def expand_sites(model: Model, name: Site | str) -> tuple[Site, ...]:
    """Return the sites that a name means; see `lvlm.model.Lvlm.sites`."""
    if isinstance(name, Site):
        sites: tuple[Site, ...] = (name,)
    else:
        try:
            stack, component, layer = parse_component(name)
        except SiteError as error:
            decoder, vision = (len(model.layers(stack)) for stack in ("decoder", "vision"))
            msg = f"{error}; layers are decoder 0-{decoder - 1}, vision 0-{vision - 1}"
            raise SiteError(msg) from error
        cross, part = component.startswith("cross."), cast("Component", component.removeprefix("cross."))
        if stack == "projector" or layer is not None:
            layers = [layer or 0]
        else:
            layers = list(range(len(model.layers(stack))))
            if part in CROSS_COMPONENTS:  # a layer can have self-attention, cross-attention or both
                layers = [n for n in layers if model.attends(stack, n, cross=cross)] or layers
        # If the model has no such stack or attention, the error for layer 0 reports it.
        sites = tuple(Site(stack, n, part, cross=cross) for n in layers or [0])
    for site in sites:
        find_hook_point(model, site)
    return sites


def find_hook_point(model: Model, site: Site) -> HookPoint:
    """Return the hook point of a site; raises `SiteError` for a site that the model lacks."""
    if site.stack == "projector":
        if not model.spec.projector:
            msg = f"site '{site}': {model.name} ({model.spec.model_type}) has no projector{_reason(model.spec)}"
            raise SiteError(msg)
        return HookPoint(resolve(model.hf, model.spec.projector, model.spec), "output")
    layers = model.layers(site.stack)
    if not 0 <= site.layer < len(layers):
        problem = (
            f"has {site.stack} layers 0-{len(layers) - 1}"
            if layers
            else f"has no {site.stack} layers that can be read{_reason(model.spec)}"
        )
        msg = f"site '{site}': {model.name} {problem}"
        raise SiteError(msg)
    if site.cross and site.component not in CROSS_COMPONENTS:
        msg = f"site '{site}' is not part of cross-attention; choose from {', '.join(CROSS_COMPONENTS)}"
        raise SiteError(msg)
    if site.component in CROSS_COMPONENTS and not model.attends(site.stack, site.layer, cross=site.cross):
        raise SiteError(_no_attention(model, site, len(layers)))
    spec, layer = model.spec.stack(site.stack), layers[site.layer]
    heads = model.n_heads if site.stack == "decoder" else model.n_vision_heads
    point = _in_layer(model.spec, spec, layer, site, heads)
    if not spec.layout:
        return point
    side = find(layer, spec.window) if spec.window and site.component in {"z", "q", "k", "v"} else None
    return replace(point, layout=spec.layout, window=int(side or 0), layer=layer)


def _in_layer(family: FamilySpec, spec: StackSpec, layer: nn.Module, site: Site, heads: int) -> HookPoint:
    def at(path: str) -> nn.Module:
        return resolve(layer, path, family)

    attention = spec.cross_attention if site.cross else spec.attention
    match site.component:
        case "resid_pre":
            return HookPoint(layer, "input")
        case "resid_post":
            return HookPoint(layer, "output")
        case "resid_mid":
            return HookPoint(at(spec.mid_norm), "input", layer=layer)
        case "z":
            return HookPoint(at(spec.cross_output_projection if site.cross else spec.output_projection), "input")
        case "attn_out":
            path = attention if site.cross else spec.attention_out or attention
            return HookPoint(at(path), "output", **_gate(layer, spec.cross_gate if site.cross else spec.attention_gate))
        case "mlp_out":
            gate = _gate(layer, spec.mlp_gate)
            row_mask = spec.mlp_row_mask if gate else ""
            return HookPoint(at(spec.mlp_out or spec.mlp), "output", layer=layer, row_mask=row_mask, **gate)
        case "pattern":
            return HookPoint(at(attention), "output", element=spec.weights)
        case _:
            paths = (
                {"q": spec.cross_query, "k": spec.cross_key, "v": spec.cross_value}
                if site.cross
                else {"q": spec.query, "k": spec.key, "v": spec.value}
            )
            path, _, third = paths[site.component].partition("#")
            third, _, by_head = third.partition("/")
            return HookPoint(at(path), "output", third=int(third) if third else None, heads=heads if by_head else 0)


def _gate(layer: nn.Module, name: str) -> dict[str, Any]:
    """Return the fields of a hook point for a layer's gate; an empty mapping for a layer without one."""
    gate = find(layer, bare(name)) if name else None
    return {"gate": gate, "tanh": name.startswith("tanh(")} if isinstance(gate, nn.Parameter) else {}


def _no_attention(model: Model, site: Site, layers: int) -> str:
    having = [str(n) for n in range(layers) if model.attends(site.stack, n, cross=site.cross)]
    if site.cross and not having:
        return f"site '{site}': {model.name} has no cross-attention layers"
    kind = "cross-attention" if site.cross else "self-attention"
    return (
        f"site '{site}': {model.name} has no {kind} in this layer; layers that have it: {', '.join(having) or 'none'}"
    )


def _reason(spec: FamilySpec) -> str:
    return f": {spec.lacks}" if spec.lacks else ""
