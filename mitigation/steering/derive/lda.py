"""Fisher's linear discriminant direction between positive and negative examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mitigation.steering.derive.base import DerivationSpec, Store, along, by_sides, keys_of
from mitigation.steering.derive.discriminant import fisher
from mitigation.steering.placement import Entry, Key
from mitigation.steering.vector import Positions, SteeringVector

if TYPE_CHECKING:
    from concepts.schema import Concept
    from lvlm.sites import Head, Site


def lda(
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
    """Return ``unit(C^-1 (mean of the positive - mean of the negative))`` at each place: Fisher's direction (1936).

    C is the pooled covariance with equal priors, shrunk as in Ledoit and Wolf (2004), fitted by scikit-learn. Sigma is the
    standard deviation of the projections of all examples used.

    Parameters
    ----------
    store, concept, positive, negative, heads, layers, sites, tokens, positions, strength
        As for `mean_difference`.

    Raises
    ------
    PatchError
        If a side has fewer than two examples, the masks overlap, the two means are equal, or there are no heads, layers
        or sites.
    SiteError
        If the store lacks a site or the concept.
    """

    def fit(positive: np.ndarray, negative: np.ndarray, key: Key) -> Entry:
        return along(fisher(positive, negative, key)[0], np.concatenate([positive, negative]), key)

    contrast = (concept, positive, negative)
    spec = DerivationSpec("lda", tokens, positions, strength)
    return by_sides(store, contrast, keys_of(heads, layers, sites), fit, spec)
