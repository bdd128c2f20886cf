"""Write to a site: replace its tensor so that every later reader uses the new value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from groundscope.core.errors import SiteError
from lvlm.access.hook_point import HookHandles
from lvlm.active_interventions import copy_mark
from lvlm.model import Lvlm
from lvlm.sites import Site

Change = Callable[[Tensor], Tensor]


def edit(model: Lvlm, site: Site, change: Change) -> Any:
    """Replace a site's tensor by `change` of it, in every forward pass until the returned handles are removed.

    Raises
    ------
    SiteError
        If the model has no such site, or nothing reads the site's tensor.
    """
    if site.component != "resid_mid":
        return model.locate(site).edit(change)
    return _edit_mid(model, site, change)


def _edit_mid(model: Lvlm, site: Site, change: Change) -> HookHandles:
    """Write to the residual stream between attention and MLP.

    No module returns this tensor, and both the norm before the MLP and the sum after it read it. So the same difference
    is added to the attention output instead.
    """
    model.locate(site)
    spec = model.spec.stack(site.stack)
    own, cross = (model.attends(site.stack, site.layer, cross=c) for c in (False, True))
    if spec.attention_post_norm or (own and cross):
        msg = f"site '{site}' cannot be changed in {model.name}; use 'resid_pre', 'attn_out' or 'mlp_out' instead"
        raise SiteError(msg)
    before: dict[str, Tensor] = {}

    def store(x: Tensor) -> None:
        before["x"] = x

    def add(x: Tensor) -> Tensor:
        stream = before["x"] + x
        return x + (change(stream) - stream)

    copy_mark(add, change)

    watched = model.place(site.stack, site.layer, "resid_pre").watch(store)
    edited = model.place(site.stack, site.layer, "attn_out", cross=cross and not own).edit(add)
    return HookHandles((watched, edited))
