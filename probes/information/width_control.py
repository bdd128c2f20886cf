"""The width control: the earlier of two sites, moved into as much unrelated variance as the later site has."""

from __future__ import annotations

import numpy as np

from probes.information.reduction import reduce_rows


def pad_site(earlier: np.ndarray, later: np.ndarray, groups: np.ndarray, *, k: int = 64, seed: int = 0) -> np.ndarray:
    """Return the earlier site next to noise that gives it the spectrum of the later one, ``[N, D + D']``.

    The same information in a wide, noisy site is harder to read from few examples and to keep in few dimensions, so it passes
    for a fall. A fall that remains in comparison with the padded earlier site is not explained by width or noise.

    Parameters
    ----------
    earlier, later
        Float [N, D] and [N, D'], the same rows.
    groups
        [N]: the group of each row.
    k
        Number of principal axes of the earlier site that predict the later one.
    seed
        Seed of the order of the noise.

    Notes
    -----
    Noise has the eigenvalues of the later site less those of the earlier site, both in descending order, where this is positive.
    Its rows are the principal components of the later site, exchanged between groups: they have its marginal distribution, and
    say nothing about the label. Before, the earlier site is scaled to the variance that its first k axes explain in the later
    one, so that the control does not depend on the units of either: by regression, corrected for the number of
    coefficients, and at least the variance that as many axes of noise would explain. Labels are not used.
    """
    x, y = (np.asarray(a, dtype=np.float64) for a in (earlier, later))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    n = len(y)
    axes = reduce_rows(x, k).values
    norms = (axes**2).sum(axis=0)
    axes = axes[:, norms > 0] / np.sqrt(norms[norms > 0])  # orthonormal columns
    total = float((y**2).sum())
    residual = total - float(((axes.T @ y) ** 2).sum())
    by_chance = axes.shape[1] / (n - 1)
    explained = total - residual / max(1 - by_chance, 1 / n)
    own = float(((axes.T @ x) ** 2).sum())
    scale = max(explained, by_chance * total) / own if own > 0 else 0.0
    values, components = _components(y)
    earlier_spectrum = np.zeros(len(values))
    of_earlier = _components(x)[0][: len(values)]
    earlier_spectrum[: len(of_earlier)] = scale * of_earlier
    excess = np.maximum(values - earlier_spectrum, 0.0)
    noise = components[:, excess > 0] * np.sqrt(excess[excess > 0])
    return np.hstack([np.sqrt(scale) * x, noise[_other_rows(groups, seed)]])


def _components(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues of ``X'X`` that are not rounding errors, descending, and orthonormal principal components [N, r]."""
    wide = x.shape[1] > x.shape[0]
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values[::-1], vectors[:, ::-1]
    valid = values > max(x.shape) * np.finfo(float).eps * max(float(values[0]), 0.0)
    values, vectors = values[valid], vectors[:, valid]
    return values, vectors if wide else (x @ vectors) / np.sqrt(values)


def _other_rows(groups: np.ndarray, seed: int) -> np.ndarray:
    """Return a permutation of rows that moves runs of rows of one group to rows of other groups."""
    _, of_row = np.unique(groups, return_inverse=True)
    place = np.random.default_rng(seed).permutation(int(of_row.max()) + 1)
    order = np.argsort(place[of_row], kind="stable")  # rows by group, groups in random order
    source = np.empty_like(order)
    source[order] = np.roll(order, len(order) // 2)
    return source
