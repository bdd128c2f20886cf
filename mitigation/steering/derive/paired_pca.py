"""The direction along which most of the difference between two sides of pairs lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from concepts.schema import CounterfactualPair
from groundscope.core.errors import PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from mitigation.steering.derive.base import Made, Variant, along, by_pairs, check_variant, keys_of
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

    Representation engineering (Zou et al. 2023, arXiv 2310.01405) takes the differences in random order of their two
    sides, so that their mean vanishes; what remains of the randomness is none where they are not centred at all, which is
    the default here. Sigma is the standard deviation of both sides' projections.

    Parameters
    ----------
    model, pairs, heads, layers, sites, tokens, positions, strength
        As for `from_pairs`.
    variant
        ``paper``, or ``release``: repeng's ``pca_diff`` (github.com/vgel/repeng), which centres the differences, and turns
        the direction to the side on which most pairs have their clean half.

    Raises
    ------
    PatchError
        For no pairs, differences that are all 0 (all alike, where centred), or no place to act on.
    SiteError
        For a head or layer that the model lacks.
    """
    check_variant(variant)

    def fit(clean: np.ndarray, corrupt: np.ndarray, key: Key) -> Entry:
        direction = first_direction(clean - corrupt, key, center=variant == "release")
        ahead = (clean - corrupt) @ direction
        turned = ahead.mean() < 0 if variant == "paper" else (ahead > 0).mean() < 0.5
        return along(-direction if turned else direction, np.concatenate([clean, corrupt]), key)

    made = Made(f"paired PCA ({variant})", tokens, positions, strength)
    return by_pairs(model, pairs, keys_of(heads, layers, sites), fit, made)


def first_direction(x: np.ndarray, key: Key, *, center: bool) -> np.ndarray:
    """Return the unit first principal direction ``[d]`` of rows ``[n, d]``; raises `PatchError` where all are alike."""
    rows = x - x.mean(axis=0) if center else x
    _, size, directions = np.linalg.svd(rows, full_matrices=False)
    if not size[0] > 1e-9 * max(1.0, float(np.abs(x).max(initial=0))):
        msg = f"at {name_of(key)} the pairs differ by {'one and the same' if center else 'nothing'}: there is no direction"
        raise PatchError(msg)
    return directions[0]
