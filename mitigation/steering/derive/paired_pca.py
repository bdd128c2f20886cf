"""The first principal direction of the differences between the two sides of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from concepts.schema import CounterfactualPair
from groundscope.core.errors import PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.derive.base import DerivationSpec, Variant, along, by_pairs, check_variant, keys_of
from mitigation.steering.placement import Entry, Key, name_of
from mitigation.steering.vector import Positions, SteeringVector


def paired_pca(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = 1.0,
    variant: Variant = "paper",
) -> SteeringVector:
    """Return the first principal direction of ``clean - corrupt``, pointing to the clean side.

    Representation engineering (Zou et al. 2023, arXiv 2310.01405) flips the sign of each difference at random, so that
    their mean vanishes. Not centering the differences gives the same direction without randomness, which is the default
    here. Sigma is the standard deviation of both sides' projections.

    Parameters
    ----------
    model, pairs, heads, layers, sites, tokens, positions, strength
        As for `from_pairs`.
    variant
        ``paper``, or ``release``: repeng's ``pca_diff`` (github.com/vgel/repeng), which centers the differences and chooses
        the sign with which most pairs have the larger projection on their clean side.

    Raises
    ------
    PatchError
        For no pairs, differences that are all 0 (all equal, if centered), or no heads, layers or sites.
    SiteError
        For a head or layer that the model lacks.
    """
    check_variant(variant)

    def fit(clean: np.ndarray, corrupt: np.ndarray, key: Key) -> Entry:
        direction = first_direction(clean - corrupt, key, center=variant == "release")
        projections = (clean - corrupt) @ direction
        flip = projections.mean() < 0 if variant == "paper" else (projections > 0).mean() < 0.5
        return along(-direction if flip else direction, np.concatenate([clean, corrupt]), key)

    spec = DerivationSpec(f"paired PCA ({variant})", tokens, positions, strength)
    return by_pairs(model, pairs, keys_of(heads, layers, sites), fit, spec)


def first_direction(x: np.ndarray, key: Key, *, center: bool) -> np.ndarray:
    """Return the unit first principal direction ``[d]`` of rows ``[n, d]``; raises `PatchError` if it is undefined."""
    rows = x - x.mean(axis=0) if center else x
    _, singular_values, directions = np.linalg.svd(rows, full_matrices=False)
    if not singular_values[0] > 1e-9 * max(1.0, float(np.abs(x).max(initial=0))):
        what = "all pairs differ in the same way" if center else "the two sides of every pair are equal"
        msg = f"at {name_of(key)} {what}, so the direction is undefined"
        raise PatchError(msg)
    return directions[0]
