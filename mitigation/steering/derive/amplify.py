"""Amplify or remove an input's deviation from a mean: in full, within a concept subspace, or along one direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from concepts.schema import Concept, CounterfactualPair
from groundscope.core.errors import PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.derive.base import (
    DerivationSpec,
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
    """Return an amplification within the subspace spanned by the mean differences of some concepts.

    Deviations are measured from the point whose projection on each mean difference is halfway between the two means. So
    each input moves further to the side of every concept that it is already on; a strength of -1 erases the subspace.

    Parameters
    ----------
    store, heads, layers, sites, tokens, positions, strength
        As for `mean_difference`; `strength` is the share of the deviation that is added.
    concepts
        One or more concepts; each excludes the examples where it is undefined.

    Raises
    ------
    PatchError
        If a concept has no true or no false example, or there are no heads, layers or sites.
    SiteError
        If the store lacks a site or a concept.
    """
    if not concepts:
        msg = "no concepts; give at least one"
        raise PatchError(msg)
    labels = [labels_of(store, str(c)) for c in concepts]
    entries: dict[Key, Entry] = {}
    for key in keys_of(heads, layers, sites):
        x = read(store, key, tokens)
        defined = ~np.isnan(x).any(axis=1)
        means = [(mean(x[(y == 1) & defined], key), mean(x[(y == 0) & defined], key)) for y in labels]
        differences = np.stack([true - false for true, false in means])  # [concepts, d]
        midpoints = np.stack([(true + false) / 2 for true, false in means])
        _, singular_values, rows = np.linalg.svd(differences, full_matrices=False)
        basis = rows[singular_values > 1e-6 * singular_values[0]] if singular_values[0] > 0 else rows[:0]
        if not len(basis):
            msg = f"at {name_of(key)} the means of true and false examples are equal, so the direction is undefined"
            raise PatchError(msg)
        # The point whose projection on each difference is that of its midpoint, in the least-squares sense.
        center = np.linalg.lstsq(differences, (differences * midpoints).sum(axis=1), rcond=1e-6)[0]
        entries[key] = Entry(center, reads=basis)
    provenance = {"method": "concept subspace", "concepts": [str(c) for c in concepts], "tokens": tokens}
    return made_from_store(store, entries, "amplify", positions, strength, provenance)


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
    """Return ``x <- mean + (1 + strength)(x - mean)`` with the mean over the corrupt runs: increase the image's effect.

    With pairs of kind ``blank`` the deviation from the mean is what a head reads from this image, so a larger deviation
    outweighs the prior, whichever answer it favors. A suitable control is the same vector at random heads, or
    `SteeringVector.randomised`.

    Parameters
    ----------
    model, heads, layers, sites, tokens, positions
        As for `from_pairs`; `tokens` and `positions` should select the same tokens.
    pairs
        Pairs of a kind that removes the visual evidence: ``blank``, ``blur``, ``noise`` or ``mask``.
    strength
        Share of the deviation that is added; negative values reduce the deviation, -1 is mean ablation.

    Raises
    ------
    PatchError
        For no pairs, or no heads, layers or sites.
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
    """Return a vector that removes the component of an activation that is typical of answers without an image.

    The direction is ``unit(mean of corrupt - mean of clean)``. Along this direction only, each input is moved to the mean
    of the clean inputs (completely at strength -1).

    Parameters
    ----------
    model, pairs, heads, layers, sites, tokens, positions
        As for `amplification`.
    strength
        -1 removes the whole deviation, 0 nothing.

    Raises
    ------
    PatchError
        For no pairs, no heads, layers or sites, or equal means.
    SiteError
        For a head or layer that the model lacks.
    """

    def fit(clean: np.ndarray, corrupt: np.ndarray, key: Key) -> Entry:
        return Entry(mean(clean, key), reads=unit_difference(corrupt, clean, key).vector[None])

    spec = DerivationSpec("prior removal", tokens, positions, strength, "amplify")
    return by_pairs(model, pairs, keys_of(heads, layers, sites), fit, spec)
