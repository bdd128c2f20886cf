"""Amplify the log-odds of Fisher's discriminant along the mean difference."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import PatchError
from mitigation.steering.derive.base import DerivationSpec, Store, by_sides, keys_of, mean
from mitigation.steering.placement import Entry, Key, name_of
from mitigation.steering.vector import Positions, SteeringVector

if TYPE_CHECKING:
    from concepts.schema import Concept
    from lvlm.sites import Head, Site


def discriminant(
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
    doubt: float = 0.0,
) -> SteeringVector:
    """Return ``x <- x + strength * (w.x + b - doubt) * c * (mean of the positive - mean of the negative)``.

    ``w.x + b`` are the log-odds of Fisher's linear discriminant with equal priors and the pooled covariance shrunk as
    in Ledoit and Wolf (2004), fitted by scikit-learn. A mean difference also contains features that are only correlated
    with the label; the discriminant gives less weight to directions with high variance within the sides, so it separates
    true from false even where the correlated features mislead. The change is added along the mean difference, which is
    the direction of the model's own answers; `c` scales it so that the gap between the two means grows by exactly
    `strength` times its size.

    Parameters
    ----------
    store, concept, positive, negative, heads, layers, sites, tokens, positions
        As for `mitigation.steering.derive.mean_difference`. Include examples that the model answers incorrectly.
    strength
        Share of the gap between the means that is added.
    doubt
        Log-odds at which nothing is added; above 0, weak evidence for true counts as evidence for false.

    Raises
    ------
    PatchError
        If a side has fewer than two examples, the masks overlap, the two means are equal, or there are no heads, layers
        or sites.
    SiteError
        If the store lacks a site or the concept.
    """
    contrast = (concept, positive, negative)
    spec = DerivationSpec("discriminant", tokens, positions, strength, "amplify", {"doubt": doubt})
    return by_sides(store, contrast, keys_of(heads, layers, sites), partial(_entry, doubt), spec)


def _entry(doubt: float, positive: np.ndarray, negative: np.ndarray, key: Key) -> Entry:
    """Fit one place from the two sides' activations, ``[n, d]`` each."""
    difference = mean(positive, key) - mean(negative, key)  # [d]
    weights, bias = fisher(positive, negative, key)
    length = float(np.linalg.norm(weights))
    gap = float(weights @ difference) / length
    if not gap > 0:
        msg = f"at {name_of(key)} the two means are equal, so the direction is undefined"
        raise PatchError(msg)
    center = weights * (doubt - bias) / length**2
    return Entry(center, reads=weights[None] / length, writes=difference[None] / gap)


def fisher(positive: np.ndarray, negative: np.ndarray, key: Key) -> tuple[np.ndarray, float]:
    """Return weights ``[d]`` and bias of Fisher's linear discriminant with equal priors and shrunk covariance.

    Raises
    ------
    PatchError
        If a side has fewer than two rows, or the means are equal.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    difference = mean(positive, key) - mean(negative, key)
    if min(len(positive), len(negative)) < 2 or not np.linalg.norm(difference) > 0:
        msg = (
            f"at {name_of(key)} there are {len(positive)} positive and {len(negative)} negative examples; "
            f"a discriminant needs at least two of each, with different means"
        )
        raise PatchError(msg)
    discriminant_analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=(0.5, 0.5))
    discriminant_analysis.fit(
        np.concatenate([positive, negative]), np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    )
    return discriminant_analysis.coef_[0], float(discriminant_analysis.intercept_[0])
