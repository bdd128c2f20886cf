"""Patch targets as users specify them: sites, heads, sets of heads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from circuits.execution.prefix_cache import crosses
from circuits.patching.sweep import Unit
from groundscope.core.errors import SiteError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site, parse_heads

RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
Target = str | Site | Head | Collection[Head | str]
"""A component of every layer (``resid_post``, ``z``), a site, a head, or heads to patch jointly."""


def units_of(model: Lvlm, sites: Target | Sequence[Target]) -> tuple[list[Unit], list[str]]:
    """Return the units to patch and their names; the parts of a unit are patched jointly.

    Parameters
    ----------
    model
        The model.
    sites
        One or several of: a component of every layer (``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``,
        ``mlp_out``, or ``z``: each head separately); a `Site` or its name (``z``: each head separately); a `Head` or its
        name (``L3.H5``); a set, tuple or list of heads or their names, patched jointly.

    Raises
    ------
    SiteError
        If the model has no such site or head, or it cannot be patched by position.
    """
    targets: Sequence[Target]
    if isinstance(sites, str | Site | Head) or (sites and all(map(_is_head, sites)) and not _is_list(sites)):
        targets = [sites]  # pyright: ignore[reportAssignmentType]  # a single target
    else:
        targets = list(sites)  # pyright: ignore[reportArgumentType]
    units: list[Unit] = []
    names: list[str] = []
    for target in targets:
        for unit, name in _units(model, target):
            units.append(unit)
            names.append(name)
    if not units:
        msg = f"sites is empty; pass components ({', '.join((*RESIDUAL, 'z'))}), sites, heads or sets of heads"
        raise SiteError(msg)
    return units, names


def head_part(model: Lvlm, head: Head) -> tuple[Site, int]:
    """Return the site and index of a head; in a layer with cross-attention only, the site is in that attention."""
    if not (0 <= head.layer < model.n_layers and 0 <= head.head < model.n_heads):
        msg = f"unknown head {head}: {model.name} has layers 0-{model.n_layers - 1} with heads 0-{model.n_heads - 1}"
        raise SiteError(msg)
    return Site("decoder", head.layer, "z", cross=crosses(model, head.layer)), head.head


def every_head(model: Lvlm) -> list[Unit]:
    """Return each head of the decoder as a separate unit, layer by layer."""
    return [(head_part(model, Head(i, h)),) for i in range(model.n_layers) for h in range(model.n_heads)]


def _is_head(target: object) -> bool:
    return isinstance(target, Head) or (isinstance(target, str) and target.startswith("L") and ".H" in target)


def _is_list(sites: object) -> bool:
    """Whether heads are separate targets (a list); a tuple or set of heads is one target."""
    return isinstance(sites, list)


def _units(model: Lvlm, target: Target) -> list[tuple[Unit, str]]:
    if isinstance(target, Head) or (isinstance(target, str) and _is_head(target)):
        (head,) = parse_heads(target)
        return [((head_part(model, head),), str(head))]
    if isinstance(target, str) and target in (*RESIDUAL, "z"):
        layers = range(model.n_layers)
        if target == "z":
            heads = [Head(i, h) for i in layers for h in range(model.n_heads)]
            return [((head_part(model, head),), str(head)) for head in heads]
        sites = [Site("decoder", i, target, cross=target == "attn_out" and crosses(model, i)) for i in layers]  # pyright: ignore[reportArgumentType]  # checked above
        return [(((site, None),), str(site)) for site in sites if _exists(model, site)]
    if isinstance(target, str | Site):
        return _of_site(model, Site.parse(target) if isinstance(target, str) else target)
    heads = sorted(set(parse_heads(target)))
    if not heads:
        msg = f"empty set of heads {target!r}: pass at least one head per set"
        raise SiteError(msg)
    return [(tuple(head_part(model, head) for head in heads), "+".join(str(head) for head in heads))]


def _of_site(model: Lvlm, site: Site) -> list[tuple[Unit, str]]:
    if site.stack != "decoder" or site.component not in (*RESIDUAL, "z"):
        components = ", ".join((*RESIDUAL, "z"))
        msg = f"site '{site}' cannot be patched at prompt tokens; choose {components} of the decoder"
        raise SiteError(msg)
    _exists(model, site)
    if site.component != "z":
        return [(((site, None),), str(site))]
    mark = "cross." if site.cross and not crosses(model, site.layer) else ""
    return [(((site, h),), f"L{site.layer}.{mark}H{h}") for h in range(model.n_heads)]


def _exists(model: Lvlm, site: Site) -> bool:
    """Return True, or raise `SiteError` if the model has no such site."""
    model.locate(site)
    return True
