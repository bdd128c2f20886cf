"""Shared parts of derivations: places, directions with their sigma, and the loop over places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.text import nearest
from lvlm.sites import Head, Site, parse_heads
from mitigation.steering.activations import mean
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.contrast import Contrast, PairContrast, StoreContrast
from mitigation.steering.places import Key, canonical, name_of
from mitigation.steering.vector import SteeringVector

Variant = Literal["paper", "release"]
"""The form in the paper, or the form in the authors' code where the two differ."""
Fit = Callable[[np.ndarray, np.ndarray, Key], VectorChange]
"""From positive activations ``[n, d]``, negative activations ``[m, d]`` and a place to the change at that place."""


def derive_at(
    contrast: Contrast,
    fit: Fit,
    method: str,
    *,
    heads: Iterable[Head | str],
    layers: Iterable[int],
    sites: Iterable[Site | str],
    tokens: str,
    positions: str,
    strength: float,
    progress: bool | None,
    details: Mapping[str, Any] | None = None,
) -> SteeringVector:
    """Fit a change at every place from the activations of a contrast's two groups.

    Parameters
    ----------
    contrast
        The examples.
    fit
        Fits one place.
    method
        Name of the method for the provenance.
    heads, layers, sites, tokens, positions, strength, progress
        As for `mitigation.derive.mean_difference`.
    details
        Additional provenance.
    """
    keys = keys_of(heads, layers, sites)
    changes = {
        key: fit(positive, negative, key) for key, positive, negative in contrast.read(keys, tokens, progress=progress)
    }
    return contrast.build(changes, method, tokens=tokens, positions=positions, strength=strength, **(details or {}))


def unit_difference(positive: np.ndarray, negative: np.ndarray, key: Key) -> AddChange:
    """Return the unit difference of two means, with the standard deviation of all projections on it."""
    difference = mean(positive, key) - mean(negative, key)
    return along(difference, np.concatenate([positive, negative]), key)


def along(direction: np.ndarray, x: np.ndarray, key: Key) -> AddChange:
    """Return a normalized direction ``[d]`` with the standard deviation of the projections of ``[n, d]`` on it.

    Raises `PatchError`, which names the place `key`, if all projections are equal.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import derive
    >>> change = derive.along(np.array([0.0, 2.0]), np.array([[0.0, 1.0], [0.0, 5.0]]), key=3)
    >>> change.direction.tolist(), change.sigma
    ([0.0, 1.0], 2.0)
    """
    length = float(np.linalg.norm(direction))
    unit = direction / length if length > 0 else direction
    sigma = float(np.std(x @ unit))
    if not sigma > 0:
        msg = f"at {name_of(key)} the two means are equal, so the direction is undefined"
        raise PatchError(msg)
    return AddChange(unit, sigma)


def check_variant(variant: str, variants: Sequence[str] = ("paper", "release")) -> None:
    """Raise `ConfigError` for a variant that a method does not have."""
    if variant not in variants:
        others = " or ".join(map(repr, variants[1:]))
        msg = f"unknown variant '{variant}'; choose 'paper', or {others} for the released code{nearest(variant, variants)}"
        raise ConfigError(msg)


def keys_of(heads: Iterable[Head | str], layers: Iterable[int], sites: Iterable[Site | str] = ()) -> tuple[Key, ...]:
    """Return heads, layers and other sites as places; raises `PatchError` if all are empty."""
    others = (Site.parse(s) if isinstance(s, str) else s for s in sites)
    keys: tuple[Key, ...] = (*parse_heads(heads), *layers, *(canonical(s) for s in others))
    if not keys:
        msg = "no heads, layers or sites to act on; pass for example heads=scores.top(8)"
        raise PatchError(msg)
    return tuple(dict.fromkeys(keys))


def require_pairs(contrast: Contrast, method: str) -> PairContrast:
    """Return a contrast of pairs; raises `PatchError` for another one."""
    if not isinstance(contrast, PairContrast):
        msg = f"{method} compares the two examples of each pair; build the contrast with Contrast.from_pairs(model, pairs)"
        raise PatchError(msg)
    return contrast


def require_store(contrast: Contrast, method: str) -> StoreContrast:
    """Return a contrast of a store's examples; raises `PatchError` for another one."""
    if not isinstance(contrast, StoreContrast):
        msg = (
            f"{method} needs the activations of all heads; build the contrast with Contrast.from_store(store, concept)"
        )
        raise PatchError(msg)
    return contrast
