"""Targets of a patch: sites, heads, sets of heads, and their names in results."""

from __future__ import annotations

from collections.abc import Sequence

from circuits.execution.prefix_cache import crosses
from circuits.head_set import HeadSet, all_heads, head_set
from circuits.patching.sweep import Unit
from groundscope.core.errors import SiteError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site

RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
Target = str | Site | Head | HeadSet
"""A component of every layer (``resid_post``, ``z``), a site, a head, or heads to patch together."""


def units_of(model: Lvlm, sites: Target | Sequence[Target]) -> tuple[list[Unit], list[str]]:
    """Return the units to patch and their names; the parts of a unit are patched jointly.

    Parameters
    ----------
    model
        The model.
    sites
        One or several of: a component of every layer (``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``,
        ``mlp_out``, or ``z``: each head separately); a `Site` or its name (``z``: each head separately); a `Head` or its
        name (``L3.H5``); a `HeadSet` or its name (``L3.H5+L4.H1``), patched together.

    Raises
    ------
    SiteError
        If the model has no such site or head, or it cannot be patched by position.
    """
    targets = [sites] if isinstance(sites, str | Site | Head | HeadSet) else list(sites)
    units: list[Unit] = []
    names: list[str] = []
    for target in targets:
        for unit, name in _units(model, target):
            units.append(unit)
            names.append(name)
    if not units:
        msg = f"sites is empty; pass components ({', '.join((*RESIDUAL, 'z'))}), sites, heads or a HeadSet"
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


def _is_head(target: str) -> bool:
    return target.startswith("L") and ".H" in target


def _units(model: Lvlm, target: Target) -> list[tuple[Unit, str]]:
    if isinstance(target, str) and target in (*RESIDUAL, "z"):
        if target == "z":
            return [((head_part(model, head),), str(head)) for head in all_heads(model)]
        layers = range(model.n_layers)
        sites = [Site("decoder", i, target, cross=target == "attn_out" and crosses(model, i)) for i in layers]  # pyright: ignore[reportArgumentType]  # checked above
        return [(((site, None),), str(site)) for site in sites if _exists(model, site)]
    if isinstance(target, Site) or (isinstance(target, str) and not _is_head(target)):
        return _of_site(model, Site.parse(target) if isinstance(target, str) else target)
    heads = head_set(target)
    return [(tuple(head_part(model, head) for head in heads), str(heads))]


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
