"""Differences of means: between positive and negative examples, or between clean and changed images."""

from __future__ import annotations

from collections.abc import Iterable

from lvlm.sites import Head, Site
from mitigation.steering.contrast import Contrast
from mitigation.steering.derive.base import derive_at, unit_difference
from mitigation.steering.vector import SteeringVector


def mean_difference(
    contrast: Contrast,
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: str = "last+generated",
    strength: float = 1.0,
    progress: bool | None = None,
) -> SteeringVector:
    """Return mass-mean directions: ``unit(mean of the positive - mean of the negative)`` at each head, layer and site.

    The strength is in units of sigma, the standard deviation of the projections of all examples of the contrast on the
    direction (ITI, Li et al. 2023, arXiv 2306.03341).

    Parameters
    ----------
    contrast
        Pairs of examples (`Contrast.from_pairs`), or two groups of examples of a store (`Contrast.from_store`). The store
        must contain ``z`` for `heads`, ``resid_post`` for `layers`, and each of `sites`.
    heads, layers, sites
        Places to act on: heads' ``z``, layers' residual streams, other decoder sites such as ``decoder.L3.mlp_out``.
    tokens
        Token selection that activations are read at. For pairs: ``last``, or ``suffix:mean`` for the mean over all tokens
        after the image.
    positions
        Token positions that the vector acts on.
    strength
        The vector's default strength, in units of sigma.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    PatchError
        If a side has no examples, the two means are equal, or there are no heads, layers or sites.
    SiteError
        If the store or the model lacks a place.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "blank")[:4]
    >>> gs.derive.mean_difference(gs.Contrast.from_pairs(model, pairs), heads=["L3.H1"])
    SteeringVector(add at L3.H1; last+generated, strength 1, for 'tiny')
    """
    method = "paired mean difference" if contrast.paired else "mean difference"
    return derive_at(
        contrast, unit_difference, method, heads=heads, layers=layers, sites=sites, tokens=tokens, positions=positions,
        strength=strength, progress=progress,
    )  # fmt: skip
