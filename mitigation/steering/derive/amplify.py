"""What sets an input apart, made larger or taken away: of its image, of some concepts, of no image at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from concepts.schema import Concept, CounterfactualPair
from groundscope.core.errors import PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.derive.base import (
    Made,
    Store,
    activations,
    by_pairs,
    keys_of,
    labels_of,
    made_from_pairs,
    made_from_store,
    mean,
    read,
    sides,
    unit_difference,
)
from mitigation.steering.placement import Entry, Key, name_of
from mitigation.steering.vector import Positions, SteeringVector


def concept_subspace(
    store: Store,
    concepts: Sequence[Concept | str],
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
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
    store, heads, layers, sites, tokens, positions, strength
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
    entries: dict[Key, Entry] = {}
    for key in keys_of(heads, layers, sites):
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


def amplification(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
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
    model, heads, layers, sites, tokens, positions
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
    keys = keys_of(heads, layers, sites)
    _, corrupt = sides(pairs)
    without = activations(model, corrupt, keys, tokens)
    entries: dict[Key, Entry] = {key: Entry(mean(without[key], key)) for key in keys}
    return made_from_pairs(model, pairs, entries, "amplify", positions, strength, ("amplification", tokens))


def prior_removal(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = -1.0,
) -> SteeringVector:
    """Return a vector that takes out what an answer shares with answers about no image.

    The direction is that from seeing to not seeing, ``unit(mean of corrupt - mean of clean)``; along it, and only
    along it, each input is brought back (fully at -1) to the mean of the inputs that were seen.

    Parameters
    ----------
    model, pairs, heads, layers, sites, tokens, positions
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

    def fit(clean: np.ndarray, corrupt: np.ndarray, key: Key) -> Entry:
        return Entry(mean(clean, key), reads=unit_difference(corrupt, clean, key).vector[None])

    made = Made("prior removal", tokens, positions, strength, "amplify")
    return by_pairs(model, pairs, keys_of(heads, layers, sites), fit, made)
