"""Read activations at sites in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor

from groundscope.core.errors import SiteError
from lvlm.access.eager_attention import eager, warn_of_eager
from lvlm.access.site_lookup import find_hook_point
from lvlm.interfaces import Model
from lvlm.sites import Site


def read_sites(
    model: Model,
    run: Callable[[], object],
    sites: Sequence[Site | str],
    *,
    take: Callable[[Site, Tensor], Tensor | None] | None = None,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """Return activations by site name, copied while a forward pass runs.

    Parameters
    ----------
    model
        The model.
    run
        Runs the forward pass; called once.
    sites, take, quiet
        As for `lvlm.model.Lvlm.read`.

    Raises
    ------
    SiteError
        For a site that the model lacks or the forward pass does not reach.
    """
    parsed = [Site.parse(s) if isinstance(s, str) else s for s in sites]
    points = [(site, find_hook_point(model, site)) for site in parsed]
    values: dict[str, Tensor] = {}
    reached: set[Site] = set()
    with_pattern = any(s.component == "pattern" for s in parsed)
    if with_pattern and not quiet:
        warn_of_eager(model)
    with ExitStack() as stack:
        if with_pattern:
            stack.enter_context(eager(model))
        for site, point in points:

            def store(x: Tensor, site: Site = site) -> None:
                reached.add(site)
                part = x if take is None else take(site, x)
                if part is not None:
                    # A view would keep the full tensor in memory, and modules may write into their inputs.
                    values[str(site)] = part.clone()

            stack.callback(point.watch(store).remove)
        run()
    missing = [site for site in parsed if site not in reached]
    if missing:
        pattern = missing[0].component == "pattern"
        why = "its attention returns no weights" if pattern else "its forward pass does not reach it"
        msg = f"site '{missing[0]}' is in {model.name}, but {why}"
        raise SiteError(msg)
    return values
