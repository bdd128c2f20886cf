"""Controls for steering vectors: other vectors with the same displacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import PatchError
from groundscope.core.text import format_count
from lvlm.sites import Head, parse_heads
from mitigation.steering.activations import mean, read
from mitigation.steering.changes import AddChange, AmplifyChange, VectorChange
from mitigation.steering.places import Key, name_of, order
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from activation_store import ActivationSource


def match_displacement(
    control: SteeringVector, vector: SteeringVector, store: ActivationSource, *, tokens: str = "last"
) -> SteeringVector:
    """Scale a control so that it moves activations as far as the vector does.

    The root mean square of the displacement over a store's examples is equal at each place.

    Parameters
    ----------
    control
        The control, with as many places as the vector and in the same order; of kind ``add`` or ``amplify``, with norm
        ``free``.
    vector
        The vector to match, with the same restrictions.
    store
        Store with the activations at the places of both.
    tokens
        Token selection that both act at.

    Returns
    -------
    SteeringVector
        The scaled control.

    Raises
    ------
    PatchError
        For other kinds, another number of places, or a control without effect.
    SiteError
        If the store lacks a place.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> vector = gs.SteeringVector({2: gs.AddChange(np.eye(8)[0], sigma=3.0)}, "last", 1.0, "m", "c")
    >>> control = gs.SteeringVector({4: gs.AddChange(np.eye(8)[1])}, "last", 1.0, "m", "c")
    >>> class Memory:  # additions displace every example equally, so no activations are read
    ...     pass
    >>> gs.match_displacement(control, vector, Memory()).changes[4].sigma
    3.0
    """
    for item in (control, vector):
        if item.kind not in ("add", "amplify") or item.norm != "free":
            msg = f"{item}: the displacement is defined only for kinds 'add' and 'amplify' with norm 'free'"
            raise PatchError(msg)
    if len(control.changes) != len(vector.changes):
        msg = (
            f"a control with {format_count(len(control.changes), 'place')} for a vector with {len(vector.changes)}; "
            "the numbers must be equal"
        )
        raise PatchError(msg)
    changes: dict[Key, VectorChange] = {}
    for (key, change), (place, reference) in zip(control.changes.items(), vector.changes.items(), strict=True):
        target, current = (displacement_rms(c, k, store, tokens) for c, k in ((reference, place), (change, key)))
        if not current > 0:
            msg = f"the control has no effect at {name_of(key)}; choose another control"
            raise PatchError(msg)
        changes[key] = _scale(change, target / current)
    return replace(control, changes=changes, provenance={**control.provenance, "as_far_as": dict(vector.provenance)})


def displacement_rms(change: VectorChange, key: Key, store: ActivationSource, tokens: str) -> float:
    """Return the displacement at a place for strength 1: root mean square over examples of the added vector's length."""
    if isinstance(change, AddChange):
        return change.sigma
    if not isinstance(change, AmplifyChange):
        msg = f"{name_of(key)}: a projection has no fixed displacement, so no control can match it; use kind add or amplify"
        raise PatchError(msg)
    x = read(store, key, tokens)
    added = change.displacements(x[~np.isnan(x).any(axis=1)])
    return float(np.sqrt((added**2).sum(axis=1).mean()))


def _scale(change: VectorChange, factor: float) -> VectorChange:
    """Return a change whose displacement is multiplied by a factor."""
    if isinstance(change, AddChange):
        return replace(change, sigma=factor * change.sigma)
    if isinstance(change, AmplifyChange):
        rows = change.writes if change.writes is not None else change.reads
        return replace(change, writes=factor * (np.eye(len(change.mean)) if rows is None else rows))
    return change


def move_to_heads(
    vector: SteeringVector, heads: Sequence[Head | str], store: ActivationSource, *, tokens: str = "last"
) -> SteeringVector:
    """Return a control: the same directions at other heads, with the same displacement.

    An amplification measures deviations from `AmplifyChange.mean`. At the new head this point is the new head's mean
    activation, plus the offset that it had from the original head's mean.

    Parameters
    ----------
    vector
        Vector at heads only, of kind ``add`` or ``amplify``.
    heads
        Other heads, one for each place, in the vector's order.
    store, tokens
        As for `match_displacement`.

    Raises
    ------
    PatchError
        For another number of heads, a repeated head, or a vector that also acts at other places.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AmplifyChange, SteeringVector, move_to_heads
    >>> class Memory:
    ...     def read(self, site, tokens, head=None, examples=None):
    ...         scale = 2.0 if site.layer == 4 else 1.0
    ...         return scale * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    >>> vector = SteeringVector({"L2.H0": AmplifyChange(np.zeros(2))}, "last", 1.0, "m", "c")
    >>> moved = move_to_heads(vector, ["L4.H1"], Memory())
    >>> moved
    SteeringVector(amplify at L4.H1; last, strength 1, for 'm')
    >>> moved.changes[moved.heads[0]].writes.tolist()  # activations there are twice as large
    [[0.5, 0.0], [0.0, 0.5]]
    """
    heads = parse_heads(heads)
    if (
        len(vector.heads) < len(vector.changes)
        or len(set(heads)) != len(vector.changes)
        or len(heads) != len(set(heads))
    ):
        msg = (
            f"{vector} needs {len(vector.changes)} different heads, not {', '.join(map(str, heads)) or 'an empty list'}"
        )
        raise PatchError(msg)
    if vector.kind == "add":
        return vector.on_heads(heads)

    def mean_at(key: Key) -> np.ndarray:
        x = read(store, key, tokens)
        return mean(x[~np.isnan(x).any(axis=1)], key)

    changes: dict[Key, VectorChange] = {}
    # In the vector's order, which `match_displacement` requires.
    for head, (key, change) in zip(sorted(heads, key=order), vector.changes.items(), strict=True):
        if not isinstance(change, AmplifyChange):
            msg = f"{vector}: a projection cannot be moved to other heads"
            raise PatchError(msg)
        changes[head] = replace(change, mean=mean_at(head) + change.mean - mean_at(key))
    provenance = {**vector.provenance, "control": f"moved from {', '.join(map(str, vector.heads))}"}
    return match_displacement(replace(vector, changes=changes, provenance=provenance), vector, store, tokens=tokens)
