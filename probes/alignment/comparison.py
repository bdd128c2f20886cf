"""Compare two arrays of paired rows by named measures, with permutation nulls and intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.intervals import check_confidence
from groundscope.core.text import format_count
from probes.alignment.gap import gap_interval
from probes.alignment.measures import DEFAULT, Measure, Settings, check_images, measures
from probes.alignment.pairing import ImageRows
from probes.alignment.rows import CLAMP, NEIGHBORS, check_pairs

if TYPE_CHECKING:
    import pandas as pd

PERMUTATIONS = 199
"""Least number of permutations of a test."""
TIE = 1e-12
"""A permuted value this close below the measured one counts as equal."""
COLUMNS = ("measure", "value", "baseline", "baseline_sd", "p", "low", "high")


@dataclass(frozen=True, eq=False)
class Draws:
    """Values of one measure at one pair of places: measured, permuted, and the ends of intervals."""

    values: np.ndarray
    """float64 [outputs]."""
    null: np.ndarray
    """float64 [B, outputs]: values for permuted images; B is 0 for measures that do not depend on pairs."""
    low: np.ndarray
    high: np.ndarray
    """NaN for measures with a null."""


@dataclass(frozen=True)
class Test:
    """How values are tested: permutations of images that all measures share, and the bootstrap of the others."""

    permutations: tuple[np.ndarray, ...]
    resamples: int
    confidence: float
    seed: int


def make_test(images: ImageRows, permutations: int, resamples: int, confidence: float, seed: int) -> Test:
    """Draw the permutations; raise `ProbeError` for options out of range."""
    if (permutations != 0 and permutations < PERMUTATIONS) or resamples < 0:
        msg = f"permutations={permutations} must be 0 or at least {PERMUTATIONS}, and resamples={resamples} at least 0"
        raise ProbeError(msg)
    check_confidence(confidence)
    return Test(tuple(images.permutations(permutations, seed)), resamples, confidence, seed)


def choose_measures(names: Sequence[str] | None, images: ImageRows, settings: Settings) -> dict[str, Measure]:
    """Return measures by name; raise `ProbeError` if one is unknown or there are too few images for it."""
    if isinstance(names, str) or (names is not None and not names):
        msg = f"measures must be a non-empty list; choose from {', '.join(measures)}"
        raise ProbeError(msg)
    chosen = {name: measures[name] for name in (DEFAULT if names is None else names)}
    if settings.k < 2 and "cknna" in chosen:
        msg = f"CKNNA needs k of at least 2 neighbors, got k={settings.k}"
        raise ProbeError(msg)
    for name, measure in chosen.items():
        check_images(name, measure, len(images), settings)
    return chosen


def draw_values(measure: Measure, a: Any, b: Any, images: ImageRows, test: Test) -> Draws:
    """Return a measure of two prepared sides, with its null or its interval."""
    values = measure.join(a, b, images)
    measured = values(np.arange(len(images)))
    unknown = np.full(len(measured), math.nan)
    if measure.paired:
        null = np.array([values(moved) for moved in test.permutations]).reshape(-1, len(measured))
        return Draws(measured, null, unknown, unknown)
    # The only such measure is the gap, of unit rows.
    low, high = (
        gap_interval(a, b, images.image, test.resamples, test.confidence, test.seed)
        if test.resamples
        else (
            math.nan,
            math.nan,
        )
    )
    return Draws(measured, np.empty((0, len(measured))), np.array([low]), np.array([high]))


def measure_rows(
    x: np.ndarray, y: np.ndarray, images: ImageRows, chosen: Mapping[str, Measure], settings: Settings
) -> np.ndarray:
    """Return the values of measures of paired rows, in order, without tests; NaN where widths must be equal and differ."""
    values = []
    for name, measure in chosen.items():
        if measure.equal_width and x.shape[1] != y.shape[1]:
            values.append(np.full(len(measure.names(name)), math.nan))
            continue
        a, b = measure.prepare(x, images, settings), measure.prepare(y, images, settings)
        values.append(measure.join(a, b, images)(np.arange(len(images))))
    return np.concatenate(values)


def one_sided_p(value: float, null: np.ndarray) -> float:
    """Return ``(1 + b) / (1 + B)``, b the number of permuted values [B] at least as high; NaN without any."""
    if not len(null) or math.isnan(value):
        return math.nan
    return (1 + int((null >= value - TIE).sum())) / (1 + len(null))


def summarize_null(value: float, null: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and the standard deviation of permuted values [B], and p."""
    mean, spread = (float(null.mean()), float(null.std())) if len(null) else (math.nan, math.nan)
    return mean, spread, one_sided_p(value, null)


def compare(
    x: np.ndarray,
    y: np.ndarray,
    images: Sequence[Hashable] | None = None,
    *,
    measures: Sequence[str] | None = None,
    k: int = NEIGHBORS,
    clamp: float | None = CLAMP,
    permutations: int = PERMUTATIONS,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare paired rows [N, D] and [N, E] of the same examples, such as images and captions.

    The null of a measure that depends on pairs: images take the captions of other images, all captions of one image together.
    The modality gap does not depend on pairs; it has a bootstrap interval over images and no p. Measures that need one space
    are NaN if widths differ.

    Parameters
    ----------
    x, y
        Vectors of images and captions; rows of one image repeat its vector.
    images
        The image of each row; by default every row is another image.
    measures
        Names of `probes.alignment.measures`; by default all but biased CKA.
    k, clamp
        Neighbors, and quantile at which rows are clamped before they are searched.
    permutations
        0, or at least 199.
    resamples, confidence
        Of the interval.
    seed
        Of permutations and bootstrap.

    Returns
    -------
    One row per value: measure, value, baseline (mean over permutations), its standard deviation, p (one-sided: the share of
    permutations with a value at least as high, ``(1 + b) / (1 + B)``), low and high.

    Raises
    ------
    ProbeError
        If rows do not pair or are not finite, a measure is unknown, or there are too few images.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(40, 8))
    >>> table = alignment.compare(x, x, measures=["cosine", "mutual_knn"])
    >>> table[["measure", "value", "p"]].round(3)
          measure  value      p
    0      cosine    1.0  0.005
    1  mutual_knn    1.0  0.005
    """
    import pandas as pd

    x, y = check_pairs(x, y)
    rows = ImageRows.of(range(len(x)) if images is None else images)
    if len(rows.image) != len(x):
        msg = f"{format_count(len(rows.image), 'image')} of {format_count(len(x), 'row')}; name the image of each row"
        raise ProbeError(msg)
    settings = Settings(k, clamp)
    chosen = choose_measures(measures, rows, settings)
    test = make_test(rows, permutations, resamples, confidence, seed)
    table: list[tuple[Any, ...]] = []
    for name, measure in chosen.items():
        names = measure.names(name)
        if measure.equal_width and x.shape[1] != y.shape[1]:
            table += [(output, *[math.nan] * 6) for output in names]
            continue
        a, b = measure.prepare(x, rows, settings), measure.prepare(y, rows, settings)
        draws = draw_values(measure, a, b, rows, test)
        for i, output in enumerate(names):
            value = float(draws.values[i])
            ends = float(draws.low[i]), float(draws.high[i])
            table.append((output, value, *summarize_null(value, draws.null[:, i]), *ends))
    return pd.DataFrame(table, columns=list(COLUMNS))
