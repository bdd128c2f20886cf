"""Amplify or remove an input's deviation from a mean: in full, within a concept subspace, or along one direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from concepts.concept import Concept
from groundscope.core.errors import PatchError
from lvlm.sites import Head, Site
from mitigation.steering.activations import labels_of, mean, read
from mitigation.steering.changes import AmplifyChange, VectorChange
from mitigation.steering.contrast import Contrast, from_store
from mitigation.steering.derive.base import derive_at, keys_of, unit_difference
from mitigation.steering.places import Key, name_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from activation_store import ActivationSource


def concept_subspace(
    store: ActivationSource,
    concepts: Sequence[Concept | str],
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: str = "last+generated",
    strength: float = 1.0,
) -> SteeringVector:
    """Return an amplification within the subspace spanned by the mean differences of some concepts.

    Deviations are measured from the point whose projection on each mean difference is halfway between the two means. So
    each input moves further to the side of every concept that it is already on; a strength of -1 erases the subspace.

    Parameters
    ----------
    store
        Store with the activations of the places.
    concepts
        One or more concepts; each excludes the examples where it is undefined.
    heads, layers, sites, tokens, positions
        As for `mean_difference`.
    strength
        Share of the deviation that is added.

    Raises
    ------
    PatchError
        If a concept has no true or no false example, or there are no heads, layers or sites.
    SiteError
        If the store lacks a site or a concept.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from mitigation import derive
    >>> class Memory:
    ...     digest, provenance = "0" * 64, {"model": {"name": "m", "config": "c"}}
    ...     def frame(self):
    ...         return pd.DataFrame({"id": ["a", "b"], "attribute:red": [1.0, 0.0]})
    ...     def read(self, site, tokens, head=None, examples=None):
    ...         return np.array([[1, 4], [3, 4]], np.float32)
    >>> change = derive.concept_subspace(Memory(), ["attribute:red"], layers=[2]).changes[2]
    >>> change.mean.tolist(), abs(change.reads).tolist()
    ([2.0, 0.0], [[1.0, 0.0]])
    """
    if not concepts:
        msg = "no concepts; give at least one"
        raise PatchError(msg)
    labels = [labels_of(store, str(c)) for c in concepts]
    changes: dict[Key, VectorChange] = {}
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
        changes[key] = AmplifyChange(center, reads=basis)
    provenance = {"method": "concept subspace", "concepts": [str(c) for c in concepts], "tokens": tokens}
    return from_store(store, changes, positions, strength, provenance)


def amplification(
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
    """Return ``x <- mean + (1 + strength)(x - mean)`` with the mean over the corrupt runs: increase the image's effect.

    With pairs of kind ``blank`` the deviation from the mean is what the image contributes to a head; increasing it strengthens
    the image against the prior. A suitable control is the same vector at random heads, or
    `SteeringVector.randomized`.

    Parameters
    ----------
    contrast
        Pairs of a kind that removes the visual evidence (``blank``, ``blur``, ``noise`` or ``mask``), or examples of a
        store; only the corrupt or negative examples are read.
    heads, layers, sites, tokens, positions, progress
        As for `mean_difference`; `tokens` and `positions` should select the same tokens.
    strength
        Share of the deviation that is added; negative values reduce the deviation, -1 is mean ablation.

    Raises
    ------
    PatchError
        For no corrupt or negative examples, or no heads, layers or sites.
    SiteError
        For a place that the store or the model lacks.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "blank")[:4]
    >>> gs.derive.amplification(gs.Contrast.from_pairs(model, pairs), heads=["L3.H1"], strength=0.5)
    SteeringVector(amplify at L3.H1; last+generated, strength 0.5, for 'tiny')
    """
    corrupt = contrast.read_negative(keys_of(heads, layers, sites), tokens, progress=progress)
    changes = {key: AmplifyChange(mean(x, key)) for key, x in corrupt}
    return contrast.build(changes, "amplification", tokens=tokens, positions=positions, strength=strength)


def prior_removal(
    contrast: Contrast,
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: str = "last+generated",
    strength: float = -1.0,
    progress: bool | None = None,
) -> SteeringVector:
    """Return a vector that removes the component of an activation that is typical of answers without an image.

    The direction is ``unit(mean of corrupt - mean of clean)``. Along this direction only, each input is moved to the mean
    of the clean inputs (completely at strength -1).

    Parameters
    ----------
    contrast, heads, layers, sites, tokens, positions, progress
        As for `amplification`.
    strength
        -1 removes the whole deviation, 0 nothing.

    Raises
    ------
    PatchError
        For no heads, layers or sites, or equal means.
    SiteError
        For a place that the store or the model lacks.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "blank")[:4]
    >>> gs.derive.prior_removal(gs.Contrast.from_pairs(model, pairs), heads=["L3.H1"])
    SteeringVector(amplify at L3.H1; last+generated, strength -1, for 'tiny')
    """

    def fit(clean: np.ndarray, corrupt: np.ndarray, key: Key) -> AmplifyChange:
        return AmplifyChange(mean(clean, key), reads=unit_difference(corrupt, clean, key).direction[None])

    return derive_at(
        contrast, fit, "prior removal", heads=heads, layers=layers, sites=sites, tokens=tokens, positions=positions,
        strength=strength, progress=progress,
    )  # fmt: skip
