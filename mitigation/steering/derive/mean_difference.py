"""Differences of means: between positive and negative examples, or between clean and changed images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from concepts.schema import Concept, CounterfactualPair
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.derive.base import DerivationSpec, Store, by_pairs, by_sides, keys_of, unit_difference
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

    Sigma is the standard deviation of the projections of all examples used (ITI, Li et al. 2023, arXiv 2306.03341).

    Parameters
    ----------
    store
        Store with ``z`` of the heads, ``resid_post`` of the layers, and the other sites.
    concept
        Examples are positive where it is true and negative where it is false; undefined examples are excluded.
    positive, negative
        Instead of a concept: boolean masks ``[N]`` of examples; by default `negative` is the complement of `positive`.
    heads, layers, sites
        Places to act on: heads' ``z``, layers' residual streams, other decoder sites such as ``decoder.L3.mlp_out``.
    tokens
        Token selection that activations are read at.
    positions
        Token positions that the vector acts on.
    strength
        The vector's default strength, in units of sigma.

    Raises
    ------
    PatchError
        If a side has no examples, the masks overlap, the two means are equal, or there are no heads, layers or sites.
    SiteError
        If the store lacks a site or the concept.
    """
    contrast, spec = (concept, positive, negative), DerivationSpec("mean difference", tokens, positions, strength)
    return by_sides(store, contrast, keys_of(heads, layers, sites), unit_difference, spec)


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
        Pairs of one kind: with ``blank``, ``blur`` or ``noise`` the direction represents the presence of any image
        content (ICT's image level, arXiv 2411.15268), with ``mask`` the presence of the object.
    heads, layers, sites, positions, strength
        As for `mean_difference`.
    tokens
        ``last``, or ``suffix`` for the mean over all tokens after the image.

    Raises
    ------
    PatchError
        For no pairs, no heads, layers or sites, or equal means.
    SiteError
        For a head or layer that the model lacks.
    """
    spec = DerivationSpec("paired mean difference", tokens, positions, strength)
    return by_pairs(model, pairs, keys_of(heads, layers, sites), unit_difference, spec)
