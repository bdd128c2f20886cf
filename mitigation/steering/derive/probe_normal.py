"""Steer along the normals of probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundscope.core.errors import SiteError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.derive.base import Store, made_from_store
from mitigation.steering.placement import Entry, Key, canonical, name_of
from mitigation.steering.vector import Positions, SteeringVector

if TYPE_CHECKING:
    from activation_store.direction import ConceptDirection


def probe_normal(
    directions: Sequence[ConceptDirection],
    source: Lvlm | Store,
    *,
    positions: Positions = "last",
    strength: float = 1.0,
) -> SteeringVector:
    """Return an additive vector along probes' directions, each with its own sigma.

    Parameters
    ----------
    directions
        Directions at heads' ``z`` or at decoder sites; one for each place.
    source
        The model, or the store that the probes were fitted on, which identifies the model.
    positions, strength
        As for `mean_difference`.

    Raises
    ------
    SiteError
        For a direction at another site, or two directions at the same place.
    PatchError
        For no directions, or a direction with sigma 0.
    """
    entries: dict[Key, Entry] = {}
    for direction in directions:
        site = Site.parse(direction.site)
        head = direction.head is not None
        if site.stack != "decoder" or (head and (site.cross or site.component != "z")):
            what = f"head {direction.head} of '{site}'" if head else f"'{site}'"
            msg = f"direction at {what}; choose a head of decoder 'z', or a decoder site"
            raise SiteError(msg)
        key = canonical(site) if direction.head is None else Head(site.layer, direction.head)
        if key in entries:
            msg = f"two directions at {name_of(key)}; give one direction for each place"
            raise SiteError(msg)
        entries[key] = Entry(direction.vector, direction.sigma)
    provenance = {"method": "probe normal", "concepts": list(dict.fromkeys(d.concept for d in directions))}
    if isinstance(source, Lvlm):
        return SteeringVector(entries, "add", positions, strength, source.name, source.config_hash, provenance)
    return made_from_store(source, entries, "add", positions, strength, provenance)
