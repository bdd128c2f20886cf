"""Fisher's linear discriminant: its direction, and the amplification of its log-odds along the mean difference."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from groundscope.core.errors import PatchError
from groundscope.core.text import format_count
from lvlm.sites import Head, Site
from mitigation.steering.activations import mean
from mitigation.steering.changes import AddChange, AmplifyChange
from mitigation.steering.contrast import Contrast
from mitigation.steering.derive.base import along, derive_at
from mitigation.steering.places import Key, name_of
from mitigation.steering.vector import SteeringVector


def lda(
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
    """Return ``unit(C^-1 (mean of the positive - mean of the negative))`` at each place: Fisher's direction (1936).

    C is the pooled covariance with equal priors, shrunk as in Ledoit and Wolf (2004), fitted by scikit-learn. Sigma is the
    standard deviation of the projections of all examples used.

    Parameters
    ----------
    contrast, heads, layers, sites, tokens, positions, strength, progress
        As for `mean_difference`.

    Raises
    ------
    PatchError
        If a side has fewer than two examples, the two means are equal, or there are no heads, layers or sites.
    SiteError
        If the store or the model lacks a place.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "blank")[:4]
    >>> gs.derive.lda(gs.Contrast.from_pairs(model, pairs), layers=[3], strength=2)
    SteeringVector(add at L3; last+generated, strength 2, for 'tiny')
    """

    def fit(positive: np.ndarray, negative: np.ndarray, key: Key) -> AddChange:
        return along(fisher(positive, negative, key)[0], np.concatenate([positive, negative]), key)

    return derive_at(
        contrast, fit, "lda", heads=heads, layers=layers, sites=sites, tokens=tokens, positions=positions,
        strength=strength, progress=progress,
    )  # fmt: skip


def discriminant(
    contrast: Contrast,
    *,
    heads: Iterable[Head | str] = (),
    layers: Iterable[int] = (),
    sites: Iterable[Site | str] = (),
    tokens: str = "last",
    positions: str = "last+generated",
    strength: float = 1.0,
    doubt: float = 0.0,
    progress: bool | None = None,
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
    contrast, heads, layers, sites, tokens, positions, progress
        As for `mean_difference`. Include examples that the model answers incorrectly.
    strength
        Share of the gap between the means that is added.
    doubt
        Log-odds at which nothing is added; above 0, weak evidence for true counts as evidence for false.

    Raises
    ------
    PatchError
        If a side has fewer than two examples, the two means are equal, or there are no heads, layers or sites.
    SiteError
        If the store or the model lacks a place.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "blank")[:4]
    >>> gs.derive.discriminant(gs.Contrast.from_pairs(model, pairs), heads=["L3.H1"], strength=0.5)
    SteeringVector(amplify at L3.H1; last+generated, strength 0.5, for 'tiny')
    """

    def fit(positive: np.ndarray, negative: np.ndarray, key: Key) -> AmplifyChange:
        difference = mean(positive, key) - mean(negative, key)  # [d]
        weights, bias = fisher(positive, negative, key)
        length = float(np.linalg.norm(weights))
        gap = float(weights @ difference) / length
        if not gap > 0:
            msg = f"at {name_of(key)} the two means are equal, so the direction is undefined"
            raise PatchError(msg)
        center = weights * (doubt - bias) / length**2
        return AmplifyChange(center, reads=weights[None] / length, writes=difference[None] / gap)

    return derive_at(
        contrast, fit, "discriminant", heads=heads, layers=layers, sites=sites, tokens=tokens, positions=positions,
        strength=strength, progress=progress, details={"doubt": doubt},
    )  # fmt: skip


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
            f"at {name_of(key)} there are {len(positive)} positive and {format_count(len(negative), 'negative example')}; "
            f"a discriminant needs at least two of each, with different means"
        )
        raise PatchError(msg)
    discriminant_analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=(0.5, 0.5))
    discriminant_analysis.fit(
        np.concatenate([positive, negative]), np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    )
    return discriminant_analysis.coef_[0], float(discriminant_analysis.intercept_[0])
