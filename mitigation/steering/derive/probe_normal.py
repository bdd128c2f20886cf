"""Steer along the normals of probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundscope.core.errors import SiteError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.contrast import from_store
from mitigation.steering.places import Key, canonical, name_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from activation_store import ActivationSource
    from activation_store.direction import ConceptDirection


def probe_normal(
    directions: Sequence[ConceptDirection],
    source: Lvlm | ActivationSource,
    *,
    positions: str = "last+generated",
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

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> direction = gs.ConceptDirection("decoder.L3.resid_post", "last", "object:cat", np.eye(model.width)[0], sigma=2.0)
    >>> gs.derive.probe_normal([direction], model, strength=3)
    SteeringVector(add at L3; last+generated, strength 3, for 'tiny')
    """
    changes: dict[Key, VectorChange] = {}
    for direction in directions:
        site = Site.parse(direction.site)
        head = direction.head is not None
        if site.stack != "decoder" or (head and (site.cross or site.component != "z")):
            what = f"head {direction.head} of '{site}'" if head else f"'{site}'"
            msg = f"direction at {what}; choose a head of decoder 'z', or a decoder site"
            raise SiteError(msg)
        key = canonical(site) if direction.head is None else Head(site.layer, direction.head)
        if key in changes:
            msg = f"two directions at {name_of(key)}; give one direction for each place"
            raise SiteError(msg)
        changes[key] = AddChange(direction.vector, direction.sigma)
    provenance = {"method": "probe normal", "concepts": list(dict.fromkeys(d.concept for d in directions))}
    if isinstance(source, Lvlm):
        return SteeringVector(changes, positions, strength, source.name, source.config_hash, provenance)
    return from_store(source, changes, positions, strength, provenance)
