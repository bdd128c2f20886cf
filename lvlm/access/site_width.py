"""How wide the tensor at a site is, from a model's modules alone: no forward, no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lvlm.sites import Site

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def site_width(model: Lvlm, site: Site) -> int:
    """Return the last axis of a site's tensor; raises `SiteError` for a site that the model lacks.

    Not for ``pattern``, whose last axis is the number of keys.
    """
    place = model.locate(site)
    if site.component in ("q", "k", "v") and isinstance(place.module, nn.Linear):
        return place.module.out_features // (1 if place.third is None else 3)
    if site.stack == "projector" or (site.stack == "decoder" and site.component not in ("z", "q", "k", "v")):
        return model.width
    projection = model.output_projection(site.stack, site.layer, cross=site.cross)
    return projection.in_features if site.component == "z" else projection.out_features
