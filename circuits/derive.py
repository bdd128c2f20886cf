"""Where steering vectors come from: each function derives one kind from a store, from pairs, or from probes.

==================  ===================================================================================  =======
function            what it pushes                                                                       kind
==================  ===================================================================================  =======
`mean_difference`   from the mean of some examples to that of others (right by looking, wrong by prior)  add
`from_pairs`        from what a changed image gives to what the clean one gives                          add
`probe_normal`      along a probe's direction                                                            add
`discriminant`      what tells true from false here, the way the model itself writes it, from a threshold   amplify
`amplification`     what this image adds to what a blank one gives: look at the image more               amplify
`concept_subspace`  each input further to its own side of some concepts: what is known speaks louder     amplify
`prior_removal`     what an answer shares with answers about no image, back to the mean of seen ones     amplify
==================  ===================================================================================  =======

An additive vector moves every question the same way. The amplifying ones move each input its own way, so that one
vector may turn a wrong yes into no and a wrong "red" into "green".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from circuits.derivation import (
    Store,
    activations,
    keys_of,
    labels_of,
    made_from_pairs,
    made_from_store,
    mean,
    read,
    sides,
    two_sides,
    unit_difference,
)
from circuits.discriminant import discriminant
from circuits.steering import Entry, Positions, SteeringVector, name_of
from concepts.errors import PatchError, SiteError
from concepts.schema import Concept, CounterfactualPair
from lvlm.model import Lvlm
from lvlm.sites import Head, Site

if TYPE_CHECKING:
    from activation_store.direction import Direction

__all__ = [
    "amplification",
    "concept_subspace",
    "discriminant",
    "from_pairs",
    "mean_difference",
    "prior_removal",
    "probe_normal",
]


# ---- from a store ------------------------------------------------------------------------------------------------------


def mean_difference(
    store: Store,
    concept: Concept | str | None = None,
    *,
    positive: np.ndarray | None = None,
    negative: np.ndarray | None = None,
    heads: Iterable[Head] = (),
    layers: Iterable[int] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = 1.0,
) -> SteeringVector:
    """Return mass-mean directions: ``unit(mean of the positive - mean of the negative)`` at each head and layer.

    Sigma is the standard deviation of the projections of all the examples used (ITI, Li et al. 2023, arXiv 2306.03341).

    Parameters
    ----------
    store
        With ``z`` of the heads and ``resid_post`` of the layers.
    concept
        Positive where it is true and negative where it is false; examples where it is undefined are left out.
    positive, negative
        Instead of a concept: boolean masks ``[N]`` of examples; `negative` is by default whatever is not positive.
    heads, layers
        Where.
    tokens
        Token selection the activations are read at.
    positions
        Where the vector will act.
    strength
        The vector's own strength, in sigmas.

    Raises
    ------
    PatchError
        Where a side has no examples, the masks overlap, the two means coincide, or there is no head and no layer.
    SiteError
        Where the store lacks a site or the concept.
    """
    right, wrong = two_sides(store, concept, positive, negative)
    entries: dict[Head | int, Entry] = {}
    for key in keys_of(heads, layers):
        x = read(store, key, tokens)
        there = ~np.isnan(x).any(axis=1)
        entries[key] = unit_difference(x[right & there], x[wrong & there], key)
    sizes = {"positive": int(right.sum()), "negative": int(wrong.sum())}
    about = {"method": "mean difference", "concept": None if concept is None else str(concept), **sizes}
    return made_from_store(store, entries, "add", positions, strength, {**about, "tokens": tokens})


def concept_subspace(
    store: Store,
    concepts: Sequence[Concept | str],
    *,
    heads: Iterable[Head] = (),
    layers: Iterable[int] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = 1.0,
) -> SteeringVector:
    """Return an amplification within the subspace that tells some concepts from their opposites.

    The subspace is spanned by the concepts' mean differences; deviations are counted from the point in it that lies,
    along each of them, in the middle between the two means. So each input is pushed further to the side of every
    concept that it is on already; a strength of -1 erases the subspace.

    Parameters
    ----------
    store, heads, layers, tokens, positions, strength
        As for `mean_difference`; strength is the share of the deviation that is added.
    concepts
        One or more; examples where one is undefined are left out for that one.

    Raises
    ------
    PatchError
        Where a concept has no true or no false example, or there is nothing to act on.
    SiteError
        Where the store lacks a site or a concept.
    """
    if not concepts:
        msg = "no concepts: name at least one"
        raise PatchError(msg)
    labels = [labels_of(store, str(c)) for c in concepts]
    entries: dict[Head | int, Entry] = {}
    for key in keys_of(heads, layers):
        x = read(store, key, tokens)
        there = ~np.isnan(x).any(axis=1)
        ends = [(mean(x[(y == 1) & there], key), mean(x[(y == 0) & there], key)) for y in labels]
        differences = np.stack([true - false for true, false in ends])  # [concepts, d]
        middles = np.stack([(true + false) / 2 for true, false in ends])
        _, size, rows = np.linalg.svd(differences, full_matrices=False)
        basis = rows[size > 1e-6 * size[0]] if size[0] > 0 else rows[:0]
        if not len(basis):
            msg = f"at {name_of(key)} the means of true and false examples coincide: there is no direction"
            raise PatchError(msg)
        # The point that projects to each pair's middle along its own difference; the least-squares one if there is none.
        center = np.linalg.lstsq(differences, (differences * middles).sum(axis=1), rcond=1e-6)[0]
        entries[key] = Entry(center, reads=basis)
    about = {"method": "concept subspace", "concepts": [str(c) for c in concepts], "tokens": tokens}
    return made_from_store(store, entries, "amplify", positions, strength, about)


# ---- from pairs --------------------------------------------------------------------------------------------------------


def from_pairs(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    heads: Iterable[Head] = (),
    layers: Iterable[int] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = 1.0,
) -> SteeringVector:
    """Return ``unit(mean of clean - corrupt)`` at each head and layer, with sigma over both sides' projections.

    Parameters
    ----------
    model
        The model to steer.
    pairs
        Of one kind: with ``blank``, ``blur``, ``noise`` the direction is that of seeing anything (ICT's image level,
        arXiv 2411.15268), with ``mask`` that of seeing the object.
    heads, layers, positions, strength
        As for `mean_difference`.
    tokens
        ``last``, or ``suffix`` for the mean over all tokens after the image.

    Raises
    ------
    PatchError
        For no pairs, no head and no layer, or means that coincide.
    SiteError
        For a head or layer that the model lacks.
    """
    keys = keys_of(heads, layers)
    clean, corrupt = (activations(model, side, keys, tokens) for side in sides(pairs))
    entries: dict[Head | int, Entry] = {key: unit_difference(clean[key], corrupt[key], key) for key in keys}
    return made_from_pairs(model, pairs, entries, "add", positions, strength, ("paired mean difference", tokens))


def amplification(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    heads: Iterable[Head] = (),
    layers: Iterable[int] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = 1.0,
) -> SteeringVector:
    """Return ``x <- mean + (1 + strength)(x - mean)`` with the mean over the corrupt runs: look at the image more.

    With pairs of kind ``blank`` the deviation from the mean is what a head took from this image, so a larger one
    outweighs what pushes an answer without looking, whichever answer that is. The control is the same at heads
    chosen at random, or `SteeringVector.randomised`.

    Parameters
    ----------
    model, heads, layers, tokens, positions
        As for `from_pairs`; `tokens` and `positions` should say the same.
    pairs
        Of a kind that destroys the evidence: ``blank``, ``blur``, ``noise`` or ``mask``.
    strength
        Share of the deviation that is added; negative ones weaken it, -1 is mean ablation.

    Raises
    ------
    PatchError
        For no pairs, or no head and no layer.
    SiteError
        For a head or layer that the model lacks.
    """
    keys = keys_of(heads, layers)
    _, corrupt = sides(pairs)
    without = activations(model, corrupt, keys, tokens)
    entries: dict[Head | int, Entry] = {key: Entry(mean(without[key], key)) for key in keys}
    return made_from_pairs(model, pairs, entries, "amplify", positions, strength, ("amplification", tokens))


def prior_removal(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    heads: Iterable[Head] = (),
    layers: Iterable[int] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = -1.0,
) -> SteeringVector:
    """Return a vector that takes out what an answer shares with answers about no image.

    The direction is that from seeing to not seeing, ``unit(mean of corrupt - mean of clean)``; along it, and only
    along it, each input is brought back (fully at -1) to the mean of the inputs that were seen.

    Parameters
    ----------
    model, pairs, heads, layers, tokens, positions
        As for `amplification`.
    strength
        -1 removes all of it, 0 nothing.

    Raises
    ------
    PatchError
        For no pairs, no head and no layer, or means that coincide.
    SiteError
        For a head or layer that the model lacks.
    """
    keys = keys_of(heads, layers)
    clean, corrupt = (activations(model, side, keys, tokens) for side in sides(pairs))
    entries: dict[Head | int, Entry] = {
        key: Entry(mean(clean[key], key), reads=unit_difference(corrupt[key], clean[key], key).vector[None])
        for key in keys
    }
    return made_from_pairs(model, pairs, entries, "amplify", positions, strength, ("prior removal", tokens))


# ---- from probes -------------------------------------------------------------------------------------------------------


def probe_normal(
    directions: Sequence[Direction],
    source: Lvlm | Store,
    *,
    positions: Positions = "last",
    strength: float = 1.0,
) -> SteeringVector:
    """Return an additive vector along probes' directions, each with its own sigma.

    Parameters
    ----------
    directions
        At heads' ``z`` or at ``resid_post`` of the decoder; one for each place.
    source
        The model, or the store the probes were fitted on: it says which model the vector is for.
    positions, strength
        As for `mean_difference`.

    Raises
    ------
    SiteError
        For a direction at another site, or two at one.
    PatchError
        For no directions, or one whose sigma is 0.
    """
    entries: dict[Head | int, Entry] = {}
    for direction in directions:
        site = Site.parse(direction.site)
        head = direction.head is not None
        if site.stack != "decoder" or site.cross or site.component != ("z" if head else "resid_post"):
            what = f"head {direction.head} of '{site}'" if head else f"'{site}'"
            msg = f"direction at {what}: steering acts on heads of decoder 'z' and on decoder 'resid_post'"
            raise SiteError(msg)
        key = site.layer if direction.head is None else Head(site.layer, direction.head)
        if key in entries:
            msg = f"two directions at {name_of(key)}: give one for each place"
            raise SiteError(msg)
        entries[key] = Entry(direction.vector, direction.sigma)
    about = {"method": "probe normal", "concepts": list(dict.fromkeys(d.concept for d in directions))}
    if isinstance(source, Lvlm):
        return SteeringVector(entries, "add", positions, strength, source.name, source.config_hash, about)
    return made_from_store(source, entries, "add", positions, strength, about)
