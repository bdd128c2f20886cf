"""What a vector is judged beside: something else that pushes exactly as far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from concepts.schema import CounterfactualPair
from groundscope.core.errors import PatchError
from lvlm.sites import Head, parse_heads
from mitigation.steering.derive.base import Store, mean, read
from mitigation.steering.placement import Entry, Key, name_of, order
from mitigation.steering.vector import SteeringVector


def matched(control: SteeringVector, vector: SteeringVector, store: Store, tokens: str = "last") -> SteeringVector:
    """Return a control that pushes as far as a vector does: entry by entry, in the root mean square over a store's examples.

    Parameters
    ----------
    control
        Of as many entries as the vector, in their order; of kind ``add`` or ``amplify``, with a free norm.
    vector
        What it is the control of; likewise.
    store
        With the activations at the places of both.
    tokens
        Token selection that both act at.

    Raises
    ------
    PatchError
        For other kinds, another number of entries, or a control that does not move anything.
    SiteError
        Where the store lacks a place.
    """
    for one in (control, vector):
        if one.kind not in ("add", "amplify") or one.norm != "free":
            msg = f"{one}: how far it pushes is known for kinds 'add' and 'amplify' with a free norm"
            raise PatchError(msg)
    if len(control.entries) != len(vector.entries):
        msg = (
            f"a control of {len(control.entries)} places for a vector of {len(vector.entries)}: one for each is needed"
        )
        raise PatchError(msg)
    entries: dict[Key, Entry] = {}
    for (key, entry), (place, own) in zip(control.entries.items(), vector.entries.items(), strict=True):
        wanted, found = (push(v, k, e, store, tokens) for v, k, e in ((vector, place, own), (control, key, entry)))
        if not found > 0:
            msg = f"the control does not move anything at {name_of(key)}"
            raise PatchError(msg)
        entries[key] = _times(entry, wanted / found, control.kind)
    return replace(control, entries=entries, provenance={**control.provenance, "as_far_as": dict(vector.provenance)})


def push(vector: SteeringVector, key: Key, entry: Entry, store: Store, tokens: str) -> float:
    """Return how far a strength of 1 moves a place: root mean square over examples of the length of what is added."""
    if vector.kind == "add":
        return entry.sigma
    x = read(store, key, tokens)
    deviation = x[~np.isnan(x).any(axis=1)] - entry.vector.astype(np.float64)
    if entry.reads is not None:
        deviation = deviation @ entry.reads.astype(np.float64).T
        deviation = deviation @ (entry.reads if entry.writes is None else entry.writes).astype(np.float64)
    elif entry.writes is not None:
        deviation = deviation @ entry.writes.astype(np.float64)
    return float(np.sqrt((deviation**2).sum(axis=1).mean()))


def _times(entry: Entry, factor: float, kind: str) -> Entry:
    """Return an entry that pushes so many times as far."""
    if kind == "add":
        return replace(entry, sigma=factor * entry.sigma)
    rows = entry.writes if entry.writes is not None else entry.reads
    return replace(entry, writes=factor * (np.eye(len(entry.vector)) if rows is None else rows))


def shuffled(mask: np.ndarray, seed: int, among: np.ndarray | None = None) -> np.ndarray:
    """Return a boolean mask ``[N]`` with as many true entries elsewhere: labels that mean nothing.

    Parameters
    ----------
    mask
        The labels.
    seed
        Decides where they go.
    among
        Boolean ``[N]``: the examples that labels are shuffled among; the others keep theirs. All by default.
    """
    which = np.flatnonzero(np.ones(len(mask), bool) if among is None else among)
    made = mask.copy()
    made[which] = mask[np.random.default_rng(seed).permutation(which)]
    return made


def swapped(pairs: Sequence[CounterfactualPair], seed: int) -> list[CounterfactualPair]:
    """Return pairs with clean and corrupt exchanged in half of them, at random: pairs whose sides mean nothing."""
    turn = np.random.default_rng(seed).permutation(len(pairs)) < len(pairs) // 2
    return [replace(p, clean=p.corrupt, corrupt=p.clean) if t else p for p, t in zip(pairs, turn, strict=True)]


def moved(vector: SteeringVector, heads: Sequence[Head | str], store: Store, tokens: str = "last") -> SteeringVector:
    """Return a control: the same directions at other heads, pushing as far.

    What an amplification counts deviations from belongs to its head: at another head it stands as far from that head's
    mean as it stood from its own's.

    Parameters
    ----------
    vector
        At heads alone, of kind ``add`` or ``amplify``.
    heads
        As many others, one for each entry in its order.
    store, tokens
        As for `matched`.

    Raises
    ------
    PatchError
        For another number of heads, a head twice, or a vector that acts elsewhere too.
    """
    heads = parse_heads(heads)
    if (
        len(vector.heads) < len(vector.entries)
        or len(set(heads)) != len(vector.entries)
        or len(heads) != len(set(heads))
    ):
        msg = (
            f"{len(vector.entries)} different heads are needed for {vector}, not {', '.join(map(str, heads)) or 'none'}"
        )
        raise PatchError(msg)
    if vector.kind == "add":
        return vector.on_heads(heads)

    def middle(key: Key) -> np.ndarray:
        x = read(store, key, tokens)
        return mean(x[~np.isnan(x).any(axis=1)], key)

    # In the vector's own order, which `matched` relies on.
    ordered = sorted(heads, key=order)
    entries: dict[Key, Entry] = {
        head: replace(entry, vector=middle(head) + entry.vector - middle(key))
        for head, (key, entry) in zip(ordered, vector.entries.items(), strict=True)
    }
    about = {**vector.provenance, "control": f"moved from {', '.join(map(str, vector.heads))}"}
    return matched(replace(vector, entries=entries, provenance=about), vector, store, tokens)
