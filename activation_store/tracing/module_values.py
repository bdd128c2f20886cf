"""Values of modules inside a trace, as `lvlm.access.hook_point.HookPoint` requires them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from groundscope.core.errors import SiteError
from lvlm.access.hook_point import first_name
from lvlm.sites import Site

if TYPE_CHECKING:
    from lvlm.decoding.prefix_run import PrefixBatch
    from lvlm.encoding.encode import Batch


def raw_value(view: Any, side: str) -> Any:
    """Return a module's input or output."""
    if side == "input":
        args, kwargs = view.inputs
        return args[0] if args else kwargs[first_name(kwargs)]
    return view.output


def check_width(site: Site, x: Tensor, width: int, batch: Batch | PrefixBatch) -> None:
    """Raise `SiteError` if a site has another width than for the first example."""
    if x.shape[-1] != width:
        msg = (
            f"site '{site}' has {x.shape[-1]} values for example '{batch.encodings[0].example.id}' and {width} for the "
            "first: a pattern can be stored only for examples of equal length; trace examples of equal length"
        )
        raise SiteError(msg)
