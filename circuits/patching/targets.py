"""What to patch, as a user says it: sites, heads, sets of heads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from circuits.execution.prefix_cache import crosses
from circuits.patching.sweep import Unit
from groundscope.core.errors import SiteError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site, parse_heads

RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
Wanted = str | Site | Head | Collection[Head | str]
"""A component of every layer (``resid_post``, ``z``), a site, a head, or heads that are patched together."""


def units_of(model: Lvlm, sites: Wanted | Sequence[Wanted]) -> tuple[list[Unit], list[str]]:
    """Return what is patched at once, and what each is called.

    Parameters
    ----------
    model
        The model.
    sites
        One or several of: a component, meaning that of every layer (``resid_pre``, ``resid_mid``, ``resid_post``,
        ``attn_out``, ``mlp_out``, or ``z``: each head apart); a `Site` or its text (of ``z``: each of its heads apart); a
        `Head` or its text (``L3.H5``); a set, tuple or list of heads or their texts, which are patched together.

    Raises
    ------
    SiteError
        For what the model does not have, or cannot be patched by position.
    """
    asked: Sequence[Wanted]
    if isinstance(sites, str | Site | Head) or (sites and all(map(_is_head, sites)) and not _is_list(sites)):
        asked = [sites]  # pyright: ignore[reportAssignmentType]  # one wanted thing
    else:
        asked = list(sites)  # pyright: ignore[reportArgumentType]
    units: list[Unit] = []
    names: list[str] = []
    for one in asked:
        for unit, name in _units(model, one):
            units.append(unit)
            names.append(name)
    if not units:
        msg = f"no sites to patch: give components of {', '.join((*RESIDUAL, 'z'))}, sites, heads or sets of heads"
        raise SiteError(msg)
    return units, names


def head_part(model: Lvlm, head: Head) -> tuple[Site, int]:
    """Return where a head is; in a layer that attends to the image alone, it is one of that attention."""
    if not (0 <= head.layer < model.n_layers and 0 <= head.head < model.n_heads):
        msg = f"head {head}: {model.name} has layers 0-{model.n_layers - 1} of heads 0-{model.n_heads - 1}"
        raise SiteError(msg)
    return Site("decoder", head.layer, "z", cross=crosses(model, head.layer)), head.head


def every_head(model: Lvlm) -> list[Unit]:
    """Return each head of the decoder as a unit of its own, layer by layer."""
    return [(head_part(model, Head(i, h)),) for i in range(model.n_layers) for h in range(model.n_heads)]


def _is_head(one: object) -> bool:
    return isinstance(one, Head) or (isinstance(one, str) and one.startswith("L") and ".H" in one)


def _is_list(sites: object) -> bool:
    """Whether heads are given one by one: in a list; a tuple or set of heads is one set."""
    return isinstance(sites, list)


def _units(model: Lvlm, one: Wanted) -> list[tuple[Unit, str]]:
    if isinstance(one, Head) or (isinstance(one, str) and _is_head(one)):
        (head,) = parse_heads(one)
        return [((head_part(model, head),), str(head))]
    if isinstance(one, str) and one in (*RESIDUAL, "z"):
        layers = range(model.n_layers)
        if one == "z":
            heads = [Head(i, h) for i in layers for h in range(model.n_heads)]
            return [((head_part(model, head),), str(head)) for head in heads]
        sites = [Site("decoder", i, one, cross=one == "attn_out" and crosses(model, i)) for i in layers]  # pyright: ignore[reportArgumentType]  # checked above
        return [(((site, None),), str(site)) for site in sites if _there(model, site)]
    if isinstance(one, str | Site):
        return _of_site(model, Site.parse(one) if isinstance(one, str) else one)
    heads = sorted(set(parse_heads(one)))
    if not heads:
        msg = f"{one!r} is no set of heads: give heads of which all are patched at once"
        raise SiteError(msg)
    return [(tuple(head_part(model, head) for head in heads), "+".join(str(head) for head in heads))]


def _of_site(model: Lvlm, site: Site) -> list[tuple[Unit, str]]:
    if site.stack != "decoder" or site.component not in (*RESIDUAL, "z"):
        there = ", ".join((*RESIDUAL, "z"))
        msg = f"site '{site}' cannot be patched at tokens of the prompt: choose {there} of the decoder"
        raise SiteError(msg)
    _there(model, site)
    if site.component != "z":
        return [(((site, None),), str(site))]
    mark = "cross." if site.cross and not crosses(model, site.layer) else ""
    return [(((site, h),), f"L{site.layer}.{mark}H{h}") for h in range(model.n_heads)]


def _there(model: Lvlm, site: Site) -> bool:
    """Raise `SiteError` where the model lacks a site."""
    model.locate(site)
    return True
