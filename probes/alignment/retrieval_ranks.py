"""Retrieval of captions by images, and of images by captions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count
from probes.alignment.pairing import ImageRows
from probes.alignment.rows import center, check_pairs, unit

CUTOFFS = (1, 5, 10)
"""Numbers of candidates at which recall is measured."""
TIE = 1e-12
"""Difference of cosines below which two candidates are tied."""


@dataclass(frozen=True, eq=False)
class RetrievalRanks:
    """The rank of the right candidate for every query, from 1; a tie with a wrong candidate counts against it.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(20, 4))
    >>> ranks = alignment.retrieval(x, x)
    >>> alignment.recall_at(ranks.text_to_image, 1)
    1.0
    """

    image_to_text: np.ndarray
    """int64 [G]: for each image, the rank of its nearest caption among all captions."""
    text_to_image: np.ndarray
    """int64 [N]: for each caption, the rank of its image among all images."""

    __repr__ = short_repr


def retrieval(
    x: np.ndarray, y: np.ndarray, images: Sequence[Hashable] | None = None, *, centered: bool = True
) -> RetrievalRanks:
    """Rank candidates by their cosine, in both directions.

    Any caption of an image is a hit for it, and no caption of the same image counts as a wrong candidate.

    Parameters
    ----------
    x, y
        Vectors of images and captions [N, D]; rows of one image repeat its vector, and its first row is used.
    images
        The image of each row; by default every row is another image.
    centered
        Subtract each side's mean first: otherwise the gap between modalities decides.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> image = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.2], [-1.0, -0.2]])
    >>> text = np.array([[1.0, 0.1], [0.9, 0.0], [-1.0, -0.2], [-1.0, 0.2]])
    >>> alignment.retrieval(image, text, ["a", "a", "b", "c"]).image_to_text
    array([1, 2, 2])
    """
    x, y = check_pairs(x, y, same_width=True)
    rows = ImageRows.of(range(len(x)) if images is None else images)
    if len(rows.image) != len(x):
        msg = f"{format_count(len(rows.image), 'image')} of {format_count(len(x), 'row')}; name the image of each row"
        raise ProbeError(msg)
    a, b = (unit(center(values) if centered else values) for values in (x, y))
    return rank(a[rows.first] @ b.T, rows.image)


def rank(similar: np.ndarray, image: np.ndarray) -> RetrievalRanks:
    """Return the ranks for similarities [G, N] of images and captions, given the image of each caption [N]."""
    own = image[None, :] == np.arange(len(similar))[:, None]
    best = np.where(own, similar, -np.inf).max(axis=1, keepdims=True)
    right = similar[image, np.arange(len(image))]
    return RetrievalRanks(
        1 + ((similar >= best - TIE) & ~own).sum(axis=1), 1 + ((similar >= right - TIE) & ~own).sum(axis=0)
    )


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Return the share of queries whose right candidate is among the first k.

    Examples
    --------
    >>> from probes import alignment
    >>> alignment.recall_at([1, 3, 7, 20], 5)
    0.5
    """
    return float((np.asarray(ranks) <= k).mean())
