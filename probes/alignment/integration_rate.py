"""The modality integration rate (MIR): how far the image tokens of a sequence are from its text tokens, over all layers.

Huang et al. 2024 (arXiv 2410.07167). In layer l, image and text tokens of many sequences are pooled, and both divided by the
mean length of the text tokens; tokens of unusual length are taken out. Then, with means m and covariances S (n - 1),

    d_l = ||m_v - m_t||^2 + tr(S_v + S_t - 2 (S_v S_t)^(1/2)),    MIR = log10 sum_l d_l.

The estimate of the covariances has an error that grows with width / tokens, and d_l with it: .03, .26 and .88 for two samples
of 200 tokens of one isotropic distribution at widths 10, 100 and 400. So compare values only at similar numbers of tokens,
which results report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from activation_store.row_input import describe_input, row_input
from activation_store.source import ActivationSource
from groundscope.core.errors import ProbeError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count, nearest
from probes.alignment.gap import centered_interval
from probes.alignment.pairing import ImageRows
from probes.protocol.inputs import find_array, read_groups, row_mask

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.format.ragged import Ragged

MirVariant = Literal["paper", "release", "release_fast"]
"""How tokens of unusual length are treated, and how the root is computed; see `frechet_distance`."""


class TokenSource(ActivationSource, Protocol):
    """An activation source with every token of a selection, such as `activation_store.ActivationStore`."""

    def ragged(self, site: str, tokens: str, head: int | None = None, examples: np.ndarray | None = None) -> Ragged:
        """Return every token of an ``:all`` selection; item i is the array [T_i, D] of example i."""
        ...


def frechet_distance(image: np.ndarray, text: np.ndarray, variant: MirVariant = "paper") -> float:
    """Return MIR's distance of one layer between pooled tokens [T, D] and [S, D].

    Parameters
    ----------
    image, text
        Tokens of all sequences.
    variant
        ``paper``: tokens whose length differs from the median by more than 3 standard deviations are dropped.
        ``release``: the released code's accurate mode, where such a token is replaced by the median of each feature.
        ``release_fast``: the released code's default, whose iteration for the root returns ``S_v S_t`` itself: the
        distance is then near ``tr S_v + tr S_t`` even for two samples of one distribution.

    Raises
    ------
    ProbeError
        If a side has fewer than 2 tokens, widths differ, values are not finite, all text tokens are 0, or the variant is
        unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x, y = np.random.default_rng(0).normal(size=(2, 200, 10))
    >>> round(alignment.frechet_distance(x, y), 2), round(alignment.frechet_distance(x, y, "release_fast"), 2)
    (0.04, 1.88)
    """
    if variant not in get_args(MirVariant):
        names = get_args(MirVariant)
        msg = f"unknown variant '{variant}' of MIR; choose from {', '.join(names)}{nearest(str(variant), names)}"
        raise ProbeError(msg)
    v, t = (np.asarray(values, dtype=np.float64) for values in (image, text))
    if v.ndim != 2 or t.ndim != 2 or v.shape[1] != t.shape[1] or min(len(v), len(t)) < 2:
        msg = f"MIR needs at least 2 image and 2 text tokens of equal width, got {list(v.shape)} and {list(t.shape)}"
        raise ProbeError(msg)
    scale = float(np.linalg.norm(t, axis=1).mean())
    if not (np.isfinite(v).all() and np.isfinite(t).all()) or scale == 0:
        msg = "MIR needs finite tokens, and text tokens that are not all 0"
        raise ProbeError(msg)
    treat = _drop_outliers if variant == "paper" else _replace_outliers
    v, t = treat(v / scale), treat(t / scale)
    mean_part = float(((v.mean(axis=0) - t.mean(axis=0)) ** 2).sum())
    a, b = (_root_factor(values) for values in (v, t))
    traces = float((a * a).sum() + (b * b).sum())
    cross = a @ b.T  # tr(S_v S_t) is its squared norm, tr (S_v S_t)^(1/2) the sum of its singular values
    if variant == "release_fast":
        return mean_part + traces - 2 * float((cross * cross).sum())
    return mean_part + traces - 2 * float(np.linalg.svd(cross, compute_uv=False).sum())


def mir_of(distances: Sequence[float] | np.ndarray) -> float:
    """Return MIR, the decimal logarithm of the sum of the layers' distances.

    Examples
    --------
    >>> from probes import alignment
    >>> alignment.mir_of([4.0, 6.0])
    1.0
    """
    total = float(np.sum(distances))
    return math.log10(total) if total > 0 else -math.inf if total == 0 else math.nan


@dataclass(frozen=True, eq=False)
class IntegrationRate:
    """MIR of a store, with its layers; returned by `mir`.

    Examples
    --------
    >>> from probes.alignment import IntegrationRate
    >>> rate = IntegrationRate(1.0, 0.9, 1.1, (0, 1), (4.0, 6.0), 490, 120, 10, "paper")
    >>> rate.table()
       layer  distance  image_tokens  text_tokens
    0      0       4.0           490          120
    1      1       6.0           490          120
    """

    value: float
    low: float
    """Interval over images, NaN without resamples; draws are moved to have the value as their mean."""
    high: float
    layers: tuple[int, ...]
    distances: tuple[float, ...]
    """d_l of each layer."""
    image_tokens: int
    """Number of pooled tokens, before tokens of unusual length are treated."""
    text_tokens: int
    n_images: int
    variant: MirVariant

    __repr__ = short_repr

    def table(self) -> pd.DataFrame:
        """Return one row per layer: distance, and the numbers of tokens that it was estimated from."""
        import pandas as pd

        columns = {"layer": list(self.layers), "distance": list(self.distances)}
        return pd.DataFrame({**columns, "image_tokens": self.image_tokens, "text_tokens": self.text_tokens})


def mir(
    store: TokenSource,
    site: str = "resid_post",
    *,
    image: str = "image:all",
    text: str = "suffix:all",
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    variant: MirVariant = "paper",
    resamples: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> IntegrationRate:
    """Return MIR of sequences that contain an image and then a text.

    The paper pairs 100 images with unrelated texts, and counts as text every token after the image, template included. MIR does
    not depend on which image stands with which text, so there is no permutation test. The last residual of a store is not
    normalized, that of Hugging Face's ``hidden_states``, which the released code reads, is.

    Parameters
    ----------
    store
        Rows that have seen both modalities, with every image and text token (``image:all``, ``suffix:all``).
    site
        Residual stream of the decoder.
    image, text
        Token selections.
    rows
        Boolean mask over the examples to use.
    variant
        As for `frechet_distance`.
    resamples, confidence, seed
        Of the bootstrap over images; each draw costs as much as the value. 0 for no interval.

    Raises
    ------
    SiteError
        If the store does not have every token of both selections.
    ProbeError
        If rows have seen one modality alone, an example has no image tokens, or too few tokens remain.

    Examples
    --------
    >>> import tempfile
    >>> import groundscope as gs
    >>> from probes import alignment
    >>> data = gs.scenes.dataset(n_images=10, splits=["neutral"])[:12]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     options = {"sites": ["resid_post"], "tokens": ["image:all", "suffix:all"], "out": folder}
    ...     store = gs.trace(gs.load_lvlm("tiny"), data, **options)
    ...     rate = alignment.mir(store, resamples=0)
    >>> len(rate.distances), rate.image_tokens
    (6, 588)
    """
    modality = row_input(store)
    if modality != "both":
        msg = (
            f"MIR compares image and text tokens of one sequence, and these rows have seen {describe_input(modality)}; trace "
            "with input='both'"
        )
        raise ProbeError(msg)
    arrays = [find_array(store, site, tokens, heads=False) for tokens in (image, text)]
    frame = store.frame()
    used = np.flatnonzero(row_mask(rows, len(frame)))
    groups = ImageRows.of(read_groups(frame)[used].tolist())
    by_image = [np.flatnonzero(groups.image == g) for g in range(len(groups))]
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(groups), size=len(groups)) for _ in range(resamples)]
    layers = tuple(layer for layer in arrays[0].layers if layer in arrays[1].layers)
    distances, distance_draws, counts = [], np.zeros(resamples), (0, 0)
    for layer in layers:
        place = arrays[0].site(layer)
        parts = [store.ragged(place, array.tokens, examples=used) for array in arrays]
        for part, name in zip(parts, (image, text), strict=True):
            empty = np.flatnonzero(part.lengths == 0)
            if empty.size:
                which = frame["id"].iloc[used[empty[0]]]
                msg = (
                    f"MIR compares image and text tokens of one sequence, and example '{which}' has none of {name}; trace "
                    f"image and text together (input='both'), and leave such examples out with rows=…"
                )
                raise ProbeError(msg)
        counts = len(parts[0].values), len(parts[1].values)
        distances.append(frechet_distance(parts[0].values, parts[1].values, variant))
        for b, draw in enumerate(draws):
            chosen = np.concatenate([by_image[g] for g in draw])
            v, t = (np.concatenate([part[i] for i in chosen]) for part in parts)
            distance_draws[b] += frechet_distance(v, t, variant)
    value = mir_of(distances)
    low, high = centered_interval(np.log10(distance_draws), value, len(groups), confidence)
    return IntegrationRate(value, low, high, layers, tuple(distances), *counts, len(groups), variant)


def _lengths(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths [T], and whether each differs from torch's (lower) median by more than 3 standard deviations (n - 1)."""
    length = np.linalg.norm(tokens, axis=1)
    return length, np.abs(length - _lower_median(length)) > 3 * length.std(ddof=1)


def _lower_median(values: np.ndarray) -> np.ndarray:
    """Return the median over the first axis; of an even number of values the lower of the middle two."""
    return np.partition(values, (len(values) - 1) // 2, axis=0)[(len(values) - 1) // 2]


def _drop_outliers(tokens: np.ndarray) -> np.ndarray:
    return tokens[~_lengths(tokens)[1]]


def _replace_outliers(tokens: np.ndarray) -> np.ndarray:
    outlier = _lengths(tokens)[1]
    return np.where(outlier[:, None], _lower_median(tokens), tokens)


def _root_factor(tokens: np.ndarray) -> np.ndarray:
    """Return R [min(T, D), D] with ``R^T R`` the covariance."""
    if len(tokens) < 2:
        msg = f"MIR: {format_count(len(tokens), 'token')} without tokens of unusual length; at least 2 are needed"
        raise ProbeError(msg)
    centered = (tokens - tokens.mean(axis=0)) / math.sqrt(len(tokens) - 1)
    return centered if len(tokens) <= tokens.shape[1] else np.asarray(np.linalg.qr(centered, mode="r"))
