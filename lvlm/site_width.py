"""Width of the tensor at a site, from a model's modules alone: no forward pass, no weights."""

from __future__ import annotations

from torch import nn

from lvlm.model import Lvlm
from lvlm.sites import Site


def site_width(model: Lvlm, site: Site) -> int:
    """Return the size of the last axis of a site's tensor; raises `SiteError` for a site that the model lacks.

    Not for ``pattern``, whose last axis is the number of keys.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.site_width import site_width
    >>> model = gs.load_lvlm("tiny")
    >>> site_width(model, gs.Site.parse("decoder.L2.resid_post")), site_width(model, gs.Site.parse("vision.L0.resid_post"))
    (192, 128)
    """
    point = model.locate(site)
    if site.component in ("q", "k", "v") and isinstance(point.module, nn.Linear):
        return point.module.out_features // (1 if point.third is None else 3)
    if site.stack == "projector" or (site.stack == "decoder" and site.component not in ("z", "q", "k", "v")):
        return model.width
    projection = model.output_projection(site.stack, site.layer, cross=site.cross)
    return projection.in_features if site.component == "z" else projection.out_features
