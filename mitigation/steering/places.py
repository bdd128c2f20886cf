"""Places that a steering vector acts on: heads, layers and sites, with their names and their order."""

from __future__ import annotations

import numpy as np

from groundscope.core.errors import SiteError
from lvlm.sites import Head, Site

Key = Head | int | Site
"""A head (its ``z``), a decoder layer by number (``resid_post``), or any other site."""
_COMPUTATION_ORDER = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
_STACKS = ("vision", "projector", "decoder")


def canonical(key: Key | str) -> Key:
    """Return a place in canonical form: text is parsed, and ``resid_post`` of a decoder layer becomes its number.

    Raises
    ------
    SiteError
        For anything else than a head, a layer's number, a site, or text that names a head or a site.
    """
    if isinstance(key, str):
        key = Head.parse(key) if key.startswith("L") else Site.parse(key)
    if isinstance(key, Site) and key.stack == "decoder" and key.component == "resid_post" and not key.cross:
        return key.layer
    if isinstance(key, Head | Site):
        return key
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return int(key)
    msg = f"{key!r} is not a place: write a head ('L3.H5'), the number of a layer, or a site ('decoder.L3.mlp_out')"
    raise SiteError(msg)


def site_of(key: Key) -> Site:
    """Return the site of an entry: ``z`` of a head's layer, ``resid_post`` of a layer, or the site itself."""
    if isinstance(key, Site):
        return key
    return Site("decoder", key.layer, "z") if isinstance(key, Head) else Site("decoder", key, "resid_post")


def name_of(key: Key) -> str:
    """Return ``L3.H5``, ``L3`` or ``decoder.L3.mlp_out``."""
    return f"L{key}" if isinstance(key, int) else str(key)


def order(key: Key) -> tuple[int, int, int, int]:
    """Return a sort key: stack, layer, order of computation in the layer; heads come before their layer's whole ``z``."""
    site = site_of(key)
    part = _COMPUTATION_ORDER.index(site.component) if site.component in _COMPUTATION_ORDER else len(_COMPUTATION_ORDER)
    head = key.head if isinstance(key, Head) else 1 << 30
    return (_STACKS.index(site.stack), site.layer, part, head)
