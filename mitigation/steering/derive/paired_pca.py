"""The first principal direction of the differences between the two sides of pairs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from groundscope.core.errors import PatchError
from lvlm.sites import Head, Site
from mitigation.steering.changes import AddChange
from mitigation.steering.contrast import Contrast
from mitigation.steering.derive.base import Variant, along, check_variant, derive_at, require_pairs
from mitigation.steering.places import Key, name_of
from mitigation.steering.vector import SteeringVector


def paired_pca(
    contrast: Contrast,
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: str = "last+generated",
    strength: float = 1.0,
    progress: bool | None = None,
    variant: Variant = "paper",
) -> SteeringVector:
    """Return the first principal direction of ``clean - corrupt``, pointing to the clean side.

    Representation engineering (Zou et al. 2023, arXiv 2310.01405) flips the sign of each difference at random, so that
    their mean vanishes. Not centering the differences gives the same direction without randomness, which is the default
    here. Sigma is the standard deviation of both sides' projections.

    Parameters
    ----------
    contrast
        Pairs (`Contrast.from_pairs`).
    heads, layers, sites, tokens, positions, strength, progress
        As for `mean_difference`.
    variant
        ``paper``, or ``release``: repeng's ``pca_diff`` (github.com/vgel/repeng), which centers the differences and chooses
        the sign with which most pairs have the larger projection on their clean side.

    Raises
    ------
    PatchError
        For a contrast without pairs, differences that are all 0 (all equal, if centered), or no heads, layers or sites.
    SiteError
        For a place that the model lacks.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "blank")[:4]
    >>> gs.derive.paired_pca(gs.Contrast.from_pairs(model, pairs), layers=[3])
    SteeringVector(add at L3; last+generated, strength 1, for 'tiny')
    """
    check_variant(variant)

    def fit(clean: np.ndarray, corrupt: np.ndarray, key: Key) -> AddChange:
        direction = first_direction(clean - corrupt, key, center=variant == "release")
        projections = (clean - corrupt) @ direction
        flip = projections.mean() < 0 if variant == "paper" else (projections > 0).mean() < 0.5
        return along(-direction if flip else direction, np.concatenate([clean, corrupt]), key)

    return derive_at(
        require_pairs(contrast, "paired_pca"), fit, f"paired PCA ({variant})", heads=heads, layers=layers, sites=sites,
        tokens=tokens, positions=positions, strength=strength, progress=progress,
    )  # fmt: skip


def first_direction(x: np.ndarray, key: Key, *, center: bool) -> np.ndarray:
    """Return the unit first principal direction ``[d]`` of rows ``[n, d]``; raises `PatchError` if it is undefined."""
    rows = x - x.mean(axis=0) if center else x
    _, singular_values, directions = np.linalg.svd(rows, full_matrices=False)
    if not singular_values[0] > 1e-9 * max(1.0, float(np.abs(x).max(initial=0))):
        what = "all pairs differ in the same way" if center else "the two sides of every pair are equal"
        msg = f"at {name_of(key)} {what}, so the direction is undefined"
        raise PatchError(msg)
    return directions[0]
