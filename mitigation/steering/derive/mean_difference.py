"""Differences of means: from some examples to others, from a changed image to the clean one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from concepts.schema import Concept, CounterfactualPair
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.derive.base import Made, Store, by_pairs, by_sides, keys_of, unit_difference
from mitigation.steering.vector import Positions, SteeringVector


def mean_difference(
    store: Store,
    concept: Concept | str | None = None,
    *,
    positive: np.ndarray | None = None,
    negative: np.ndarray | None = None,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = 1.0,
) -> SteeringVector:
    """Return mass-mean directions: ``unit(mean of the positive - mean of the negative)`` at each head and layer.

    Sigma is the standard deviation of the projections of all the examples used (ITI, Li et al. 2023, arXiv 2306.03341).

    Parameters
    ----------
    store
        With ``z`` of the heads, ``resid_post`` of the layers, and the other sites.
    concept
        Positive where it is true and negative where it is false; examples where it is undefined are left out.
    positive, negative
        Instead of a concept: boolean masks ``[N]`` of examples; `negative` is by default whatever is not positive.
    heads, layers, sites
        Where: heads' ``z``, layers' residual streams, other decoder sites such as ``decoder.L3.mlp_out``.
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
    told, made = (concept, positive, negative), Made("mean difference", tokens, positions, strength)
    return by_sides(store, told, keys_of(heads, layers, sites), unit_difference, made)


def from_pairs(
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
    """Return ``unit(mean of clean - corrupt)`` at each head and layer, with sigma over both sides' projections.

    Parameters
    ----------
    model
        The model to steer.
    pairs
        Of one kind: with ``blank``, ``blur``, ``noise`` the direction is that of seeing anything (ICT's image level,
        arXiv 2411.15268), with ``mask`` that of seeing the object.
    heads, layers, sites, positions, strength
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
    made = Made("paired mean difference", tokens, positions, strength)
    return by_pairs(model, pairs, keys_of(heads, layers, sites), unit_difference, made)
