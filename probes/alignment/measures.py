"""The measures by name, in the form that permutation tests need.

A measure has two steps. `Measure.prepare` reduces one side's rows to what the measure needs, once per layer. `Measure.join`
takes both sides and returns the function from a permutation of images to the values. So a permutation costs no more than
the pairing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.registry import Registry
from groundscope.core.text import format_count
from probes.alignment.kernels import NeighborKernel, gram, join_grams, join_neighbor_kernels
from probes.alignment.neighbors import adjacency, find_neighbors
from probes.alignment.pairing import ImageRows
from probes.alignment.retrieval_ranks import CUTOFFS, rank, recall_at
from probes.alignment.rows import CLAMP, NEIGHBORS, center, clamped_unit, unit


@dataclass(frozen=True)
class Settings:
    """What measures have in common.

    Examples
    --------
    >>> from probes.alignment import Settings
    >>> Settings(k=5).clamp
    0.95
    """

    k: int = NEIGHBORS
    """Number of neighbors."""
    clamp: float | None = CLAMP
    """Quantile at which rows are clamped for neighbors; None for no clamping."""
    limit: float | None = None
    """Clamp at this value instead, for every measure of neighbors and kernels, with rows of unit length: the form of the
    code of Huh et al., whose limit is that of all layers."""

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Return rows for measures of neighbors: clamped and of unit length."""
        return clamped_unit(x, self.clamp, self.limit)


Values = Callable[[np.ndarray], np.ndarray]
"""Function from a permutation of images, int64 [G] (`ImageRows.permutations`), to the values of a measure, [outputs]."""


@dataclass(frozen=True)
class Measure:
    """A measure of two sides with paired rows.

    Examples
    --------
    >>> import numpy as np
    >>> from probes.alignment import ImageRows, Settings, measures
    >>> x, images = np.random.default_rng(0).normal(size=(20, 4)), ImageRows.of(range(20))
    >>> cosine = measures["cosine"]
    >>> side = cosine.prepare(x, images, Settings())
    >>> cosine.join(side, side, images)(np.arange(20)).round(6)
    array([1.])
    """

    prepare: Callable[[np.ndarray, ImageRows, Settings], Any]
    """From one side's rows [N, D]."""
    join: Callable[[Any, Any, ImageRows], Values]
    outputs: tuple[str, ...] = ()
    """Names of the values; by default one, that of the measure."""
    equal_width: bool = False
    """Whether both sides must be in one space."""
    paired: bool = True
    """Whether the values depend on which rows pair: then they have a permutation null, otherwise a bootstrap interval."""
    images: Callable[[Settings], int] = lambda settings: 4
    """Least number of images."""
    examples: Callable[[Any, Any, ImageRows], np.ndarray] | None = None
    """Scores of each row, [N]; NaN for rows that are not used."""

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the values of a measure registered by `name`."""
        return self.outputs or (name,)


def check_images(name: str, measure: Measure, n: int, settings: Settings) -> None:
    """Raise `ProbeError` if there are too few images for a measure."""
    needed = measure.images(settings)
    if n < needed:
        msg = f"{name} with k={settings.k} needs {format_count(needed, 'image')}, got {n}: give more images or leave out {name}"
        raise ProbeError(msg)


def _cosine(a: np.ndarray, b: np.ndarray, images: ImageRows) -> Values:
    return lambda moved: np.array([np.einsum("nd,nd->", a, b[images.rows(moved)]) / len(a)])


def _retrieval(a: np.ndarray, b: np.ndarray, images: ImageRows) -> Values:
    similar = a[images.first] @ b.T

    def values(moved: np.ndarray) -> np.ndarray:
        ranks = rank(similar, np.argsort(moved)[images.image])  # the captions of image moved[g] are those of image g
        return np.array([recall_at(r, k) for r in (ranks.image_to_text, ranks.text_to_image) for k in CUTOFFS])

    return values


def _overlap(a: np.ndarray, b: np.ndarray, moved: np.ndarray) -> np.ndarray:
    i = np.arange(len(moved))[:, None]
    return b[moved[i], moved[a]].mean(axis=1)


def _of_first(values: np.ndarray, images: ImageRows) -> np.ndarray:
    out = np.full(len(images.image), np.nan)
    out[images.first] = values
    return out


def _cka(*, unbiased: bool) -> Measure:
    def kernel(x: np.ndarray, images: ImageRows, settings: Settings) -> np.ndarray:
        x = x[images.first]
        return gram(x if settings.limit is None else settings.scaled(x))

    def join(k: np.ndarray, l: np.ndarray, images: ImageRows) -> Values:  # noqa: E741
        value = join_grams(k, l, unbiased=unbiased)
        return lambda moved: np.array([value(moved)])

    return Measure(kernel, join)


def _join_cknna(a: NeighborKernel, b: NeighborKernel, images: ImageRows) -> Values:
    value = join_neighbor_kernels(a, b)
    return lambda moved: np.array([value(moved)])


def _prepare_neighbors(x: np.ndarray, images: ImageRows, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    near = find_neighbors(settings.scaled(x[images.first]), settings.k)
    return near, adjacency(near)


def _prepare_unit(x: np.ndarray, images: ImageRows, settings: Settings) -> np.ndarray:
    return unit(center(x))


measures: Registry[Measure] = Registry(
    "measure of alignment",
    {
        "cosine": Measure(
            _prepare_unit,
            _cosine,
            equal_width=True,
            images=lambda settings: 2,
            examples=lambda a, b, images: (a * b).sum(axis=1),
        ),
        "retrieval": Measure(
            _prepare_unit,
            _retrieval,
            tuple(f"{way}@{k}" for way in ("image_to_text", "text_to_image") for k in CUTOFFS),
            equal_width=True,
            images=lambda settings: CUTOFFS[-1] + 1,
            examples=lambda a, b, images: rank(a[images.first] @ b.T, images.image).text_to_image.astype(float),
        ),
        "cka": _cka(unbiased=True),
        "cka_biased": _cka(unbiased=False),
        "cknna": Measure(
            lambda x, images, settings: NeighborKernel.of(settings.scaled(x[images.first]), settings.k),
            _join_cknna,
            images=lambda settings: max(4, settings.k + 1),
        ),
        "mutual_knn": Measure(
            _prepare_neighbors,
            lambda a, b, images: lambda moved: np.array([_overlap(a[0], b[1], moved).mean()]),
            images=lambda settings: settings.k + 1,
            examples=lambda a, b, images: _of_first(_overlap(a[0], b[1], np.arange(len(images))), images),
        ),
        "modality_gap": Measure(
            lambda x, images, settings: unit(x),
            lambda a, b, images: lambda moved: np.array([np.linalg.norm((a - b).mean(axis=0))]),
            equal_width=True,
            paired=False,
            images=lambda settings: 2,
        ),
    },
    error=ProbeError,
)
"""Measures by name. `cosine` and `retrieval` use every caption of an image; `cka`, `cknna` and `mutual_knn` compare relations
between images, and use the first caption of each. The values of `retrieval` are ``image_to_text@1`` to ``text_to_image@10``."""
DEFAULT = ("cosine", "retrieval", "cka", "cknna", "mutual_knn", "modality_gap")
"""Measures that are computed by default."""
