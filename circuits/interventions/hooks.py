"""Writing to a site: where its tensor can be replaced, so that all that reads it afterwards reads what was put there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from groundscope.core.errors import SiteError
from lvlm.access.places import Handles
from lvlm.applied import marked_as
from lvlm.model import Lvlm
from lvlm.sites import Site

Change = Callable[[Tensor], Tensor]


def edit(model: Lvlm, site: Site, change: Change) -> Any:
    """Replace a site's tensor by what `change` makes of it, on every forward until the handles returned are removed.

    Raises
    ------
    SiteError
        For a site that the model lacks, or whose tensor nothing else reads.
    """
    if site.component != "resid_mid":
        return model.locate(site).edit(change)
    return _edit_mid(model, site, change)


def _edit_mid(model: Lvlm, site: Site, change: Change) -> Handles:
    """Write to the residual stream between attention and MLP.

    It is no module's own tensor: the norm before the MLP reads it, and so does the sum after the MLP. What attention adds
    makes it, and is changed by as much.
    """
    model.locate(site)
    spec = model.spec.stack(site.stack)
    own, cross = (model.attends(site.stack, site.layer, cross=c) for c in (False, True))
    if spec.attention_post_norm or (own and cross):
        msg = f"site '{site}' cannot be changed in {model.name}: write to 'resid_pre', 'attn_out' or 'mlp_out' instead"
        raise SiteError(msg)
    before: dict[str, Tensor] = {}

    def see(x: Tensor) -> None:
        before["x"] = x

    def add(x: Tensor) -> Tensor:
        stream = before["x"] + x
        return x + (change(stream) - stream)

    marked_as(add, change)

    watched = model.place(site.stack, site.layer, "resid_pre").watch(see)
    edited = model.place(site.stack, site.layer, "attn_out", cross=cross and not own).edit(add)
    return Handles((watched, edited))
