"""Controls for steering vectors: other directions, labels or heads with the same displacement."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from concepts.schema import CounterfactualPair
from groundscope.core.errors import PatchError
from groundscope.core.permutations import LEAST_MOVABLE, exchange_groups, movable_groups
from lvlm.sites import Head, parse_heads
from mitigation.steering.derive.base import Store, mean, read
from mitigation.steering.placement import Entry, Key, name_of, order
from mitigation.steering.vector import SteeringVector


def match_displacement(
    control: SteeringVector, vector: SteeringVector, store: Store, tokens: str = "last"
) -> SteeringVector:
    """Scale a control so that each entry displaces as far as the vector's: equal root mean square over a store's examples.

    Parameters
    ----------
    control
        The control, with as many entries as the vector and in the same order; of kind ``add`` or ``amplify``, with norm
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
        For other kinds, another number of entries, or a control without effect.
    SiteError
        If the store lacks a place.
    """
    for item in (control, vector):
        if item.kind not in ("add", "amplify") or item.norm != "free":
            msg = f"{item}: the displacement is defined only for kinds 'add' and 'amplify' with norm 'free'"
            raise PatchError(msg)
    if len(control.entries) != len(vector.entries):
        msg = f"a control with {len(control.entries)} places for a vector with {len(vector.entries)}; the numbers must be equal"
        raise PatchError(msg)
    entries: dict[Key, Entry] = {}
    for (key, entry), (place, reference) in zip(control.entries.items(), vector.entries.items(), strict=True):
        target, current = (
            displacement_rms(v, k, e, store, tokens) for v, k, e in ((vector, place, reference), (control, key, entry))
        )
        if not current > 0:
            msg = f"the control has no effect at {name_of(key)}; choose another control"
            raise PatchError(msg)
        entries[key] = _scale(entry, target / current, control.kind)
    return replace(control, entries=entries, provenance={**control.provenance, "as_far_as": dict(vector.provenance)})


def displacement_rms(vector: SteeringVector, key: Key, entry: Entry, store: Store, tokens: str) -> float:
    """Return the displacement at a place for strength 1: root mean square over examples of the added vector's length."""
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


def _scale(entry: Entry, factor: float, kind: str) -> Entry:
    """Return an entry whose displacement is multiplied by a factor."""
    if kind == "add":
        return replace(entry, sigma=factor * entry.sigma)
    rows = entry.writes if entry.writes is not None else entry.reads
    return replace(entry, writes=factor * (np.eye(len(entry.vector)) if rows is None else rows))


def shuffle_mask(
    mask: np.ndarray, seed: int, among: np.ndarray | None = None, *, groups: Sequence[Hashable] | None = None
) -> np.ndarray:
    """Return a boolean mask ``[N]`` with the same number of true entries and shuffled labels.

    Groups with equal numbers of rows exchange their labels as a whole (`groundscope.core.permutations.exchange_groups`),
    because rows of one image share their content: labels that are constant within an image remain constant.

    Parameters
    ----------
    mask
        The labels.
    seed
        Seed of the shuffle.
    among
        Boolean ``[N]``: the examples whose labels are shuffled; the others keep theirs. All by default.
    groups
        ``[N]``: the group of each row; None if every row is a separate group.

    Raises
    ------
    PatchError
        If fewer than `groundscope.core.permutations.LEAST_MOVABLE` groups can take other labels.
    """
    indices = np.flatnonzero(np.ones(len(mask), bool) if among is None else among)
    names = np.arange(len(mask)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    constant = np.zeros(len(indices), dtype=np.int64)
    movable = movable_groups(names[indices], constant, mask[indices])
    if movable.sum() < LEAST_MOVABLE:
        msg = (
            f"labels cannot be shuffled: only {int(movable.sum())} of {len(movable)} groups can take other labels, "
            f"{LEAST_MOVABLE} are needed; only groups with equal numbers of examples exchange labels, so trace more images"
        )
        raise PatchError(msg)
    shuffled_mask = mask.copy()
    shuffled_mask[indices] = mask[indices][exchange_groups(names[indices], constant, seed)]
    return shuffled_mask


def swap_sides(pairs: Sequence[CounterfactualPair], seed: int) -> list[CounterfactualPair]:
    """Return pairs with clean and corrupt exchanged in a random half of them, so that the sides carry no information.

    Pairs of one image are exchanged together, because the difference between their sides is similar: groups are taken in
    random order until half of the pairs are exchanged. With fewer than `groundscope.core.permutations.LEAST_MOVABLE`
    groups, pairs are exchanged individually.
    """
    rng = np.random.default_rng(seed)
    groups = [p.group for p in pairs]
    names = list(dict.fromkeys(groups))
    if len(names) < LEAST_MOVABLE:
        exchange = rng.permutation(len(pairs)) < len(pairs) // 2
    else:
        remaining, chosen = len(pairs) // 2, set[str]()
        for name in (names[i] for i in rng.permutation(len(names))):
            if groups.count(name) <= remaining:
                chosen.add(name)
                remaining -= groups.count(name)
        exchange = np.array([name in chosen for name in groups])
    return [replace(p, clean=p.corrupt, corrupt=p.clean) if t else p for p, t in zip(pairs, exchange, strict=True)]


def move_to_heads(
    vector: SteeringVector, heads: Sequence[Head | str], store: Store, tokens: str = "last"
) -> SteeringVector:
    """Return a control: the same directions at other heads, with the same displacement.

    The reference point of an amplification belongs to its head: at another head, its offset from that head's mean equals
    its offset from the mean of the original head.

    Parameters
    ----------
    vector
        Vector at heads only, of kind ``add`` or ``amplify``.
    heads
        Other heads, one for each entry, in the entries' order.
    store, tokens
        As for `match_displacement`.

    Raises
    ------
    PatchError
        For another number of heads, a repeated head, or a vector that also acts at other places.
    """
    heads = parse_heads(heads)
    if (
        len(vector.heads) < len(vector.entries)
        or len(set(heads)) != len(vector.entries)
        or len(heads) != len(set(heads))
    ):
        msg = (
            f"{vector} needs {len(vector.entries)} different heads, not {', '.join(map(str, heads)) or 'an empty list'}"
        )
        raise PatchError(msg)
    if vector.kind == "add":
        return vector.on_heads(heads)

    def mean_at(key: Key) -> np.ndarray:
        x = read(store, key, tokens)
        return mean(x[~np.isnan(x).any(axis=1)], key)

    # In the vector's order, which `match_displacement` requires.
    ordered = sorted(heads, key=order)
    entries: dict[Key, Entry] = {
        head: replace(entry, vector=mean_at(head) + entry.vector - mean_at(key))
        for head, (key, entry) in zip(ordered, vector.entries.items(), strict=True)
    }
    provenance = {**vector.provenance, "control": f"moved from {', '.join(map(str, vector.heads))}"}
    return match_displacement(replace(vector, entries=entries, provenance=provenance), vector, store, tokens)
