"""Simulated data of known truth: stores with labels independent of the features, and rows correlated within groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from tests.toys.memory_store import MemoryStore

SIZES = (1, 2, 3, 10, 16)
SHARES = (0.4, 0.2, 0.2, 0.1, 0.1)
"""How many images have so many questions."""
KINDS = ("equal", "unlike", "undefined")


def null_rows(kind: str, seed: int, groups: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features ``[N, 1, 8]``, labels ``[N]`` and groups ``[N]``: both are properties of the image, and independent.

    ``equal``: four questions an image; ``unlike``: from 1 to 16; ``undefined``: twelve, the label being defined for some.
    """
    rng = np.random.default_rng(70000 + seed)
    size = {
        "equal": np.full(groups, 4),
        "unlike": rng.choice(SIZES, groups, p=SHARES),
        "undefined": np.full(groups, 12),
    }[kind]
    labels = np.repeat((rng.random(groups) < 0.5).astype(float), size)
    names = np.repeat([f"g{i}" for i in range(groups)], size)
    if kind == "undefined":
        defined = [np.arange(12) < rng.choice((1, 2, 3, 10, 12), p=SHARES) for _ in range(groups)]
        labels = np.where(np.concatenate(defined), labels, np.nan)
    features = np.repeat(rng.normal(size=(groups, 1, 8)), size, axis=0) + 0.3 * rng.normal(size=(len(names), 1, 8))
    return features, labels, names


def null_store(kind: str, seed: int, groups: int = 60) -> MemoryStore:
    """Return a store of `null_rows`, with one concept."""
    features, labels, names = null_rows(kind, seed, groups)
    table = pd.DataFrame({"id": [f"r{i}" for i in range(len(names))], "group": names, "object:a": labels})
    return MemoryStore(table, {("decoder", "resid_post", "last"): features})


def mean_distance_p(
    shuffle: Callable[..., np.ndarray], kind: str, seed: int, permutations: int = 99, groups: int = 60
) -> float:
    """Return the p-value of the distance of the two classes' means, against labels permuted by `shuffle`."""
    features, labels, names = null_rows(kind, seed, groups)
    used = ~np.isnan(labels)
    x, y, names = features[used, 0], labels[used], names[used]
    x = x - x.mean(axis=0)

    def distance(y: np.ndarray) -> float:
        d = (x * (y - y.mean())[:, None]).sum(axis=0) / (len(y) * y.var() + 1e-12)
        return float(d @ d)

    part = np.zeros(len(y), dtype=int)
    true = distance(y)
    permuted = [distance(shuffle(y, names, part, [seed, k])) for k in range(permutations)]
    return (1 + sum(d >= true for d in permuted)) / (1 + permutations)


def group_sizes(kind: int | str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return numbers of rows ``[R, G]``: all alike, or ``"unlike"``."""
    return rng.choice(SIZES, shape, p=SHARES) if kind == "unlike" else np.full(shape, int(kind))


def rates_by_group(
    sizes: np.ndarray, rate: float, agreement: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return hits and trials float64 ``[R, G]``; rows of a group correlate by `agreement` (beta-binomial), 1: all the same."""
    if agreement == 0:
        own = np.full(sizes.shape, rate)
    elif agreement == 1:
        own = (rng.random(sizes.shape) < rate).astype(float)
    else:
        scale = (1 - agreement) / agreement
        own = rng.beta(rate * scale, (1 - rate) * scale, size=sizes.shape)
    return rng.binomial(sizes, own).astype(float), sizes.astype(float)


def means_by_group(kind: str, groups: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Return values ``[N]``, groups ``[N]`` and the true mean: ``normal`` or ``skewed`` groups of 1 to 8 rows."""
    size = rng.choice((1, 2, 4, 8), groups)
    of_group = rng.normal(size=groups) if kind == "normal" else rng.exponential(size=groups)
    index = np.repeat(np.arange(groups), size)
    return of_group[index] + 0.5 * rng.normal(size=len(index)), index, 0.0 if kind == "normal" else 1.0


def margins_by_group(
    groups: int, distance: float, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels ``[N]``, margins ``[N]`` and groups ``[N]``: margins of a group share half of their variance.

    Balanced accuracy is ``norm.cdf(distance / 2)``, the area under the ROC curve ``norm.cdf(distance / sqrt(2))``.
    """
    index = np.repeat(np.arange(groups), rng.choice((1, 2, 4), groups))
    labels = (rng.random(len(index)) < share).astype(float)
    noise = np.sqrt(0.5) * (rng.normal(size=groups)[index] + rng.normal(size=len(index)))
    return labels, noise + distance * (labels - 0.5), index
