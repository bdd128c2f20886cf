"""Permutations of labels of grouped rows, such as the questions of one image.

A permutation test, or a control with shuffled labels, needs labels that are independent of the features. Rows of a group
share features and labels, so labels move in blocks: a group takes the labels of another whole group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

LEAST_MOVABLE = 10
"""Least number of movable groups for a meaningful permutation; see `movable_groups`."""


def exchange_groups(
    groups: Sequence[Hashable] | np.ndarray, parts: np.ndarray, seed: int | list[int] | np.random.Generator
) -> np.ndarray:
    """Return for each row the row whose label it takes; groups of one part and one size exchange their rows.

    Parameters
    ----------
    groups
        ``[N]``: the group of each row.
    parts
        ``[N]``: the part of each row (a fold, the held-out rows); a group belongs to one part.
    seed
        Seed of the random order.

    Returns
    -------
    ndarray
        int64 ``[N]``, a permutation: ``labels[result]`` are the exchanged labels. Every group takes all rows of one group
        of its part and size, in random order.

    Notes
    -----
    Validity of p-values: the permutations that map every group onto a group of its part and size, in any order
    of rows, are a group in the algebraic sense (a product of wreath products ``S_m wr S_k``, one for each part and size m
    with k groups), and this function draws from it uniformly. If labels do not depend on features, then given
    features, parts and sizes the labels of groups of one size are exchangeable, and so are those within a group: the
    distribution of the labels is the same under every such permutation. Then the rank of the true labels' statistic among
    those of B drawn permutations is uniform up to ties, and ``(1 + b) / (1 + B)`` is at most a with probability at most a,
    for any statistic (Hemerik & Goeman 2018, TEST 27:811, theorem 2). Exchanging labels among groups of different sizes
    is not such a permutation: it splits blocks, so permuted labels agree less within groups than true labels, and the
    true labels seem exceptional without reason.

    A group whose size is unique in its part keeps its labels, up to their order.
    """
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    group, of_part, size = _blocks(groups, parts)
    n = len(group)
    if n == 0:
        return np.empty(0, dtype=np.int64)
    rank = rng.permutation(len(size))
    # Sorted by part and size, blocks of one size are next to each other; sources in random order of groups and rows.
    source = np.lexsort((rng.random(n), rank[group], size[group], of_part[group]))
    target = np.lexsort((group, size[group], of_part[group]))
    result = np.empty(n, dtype=np.int64)
    result[target] = source
    return result


def movable_groups(groups: Sequence[Hashable] | np.ndarray, parts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return which groups can get other labels by `exchange_groups`.

    A group can if its own rows differ in their labels, or if another group of its part and size has other labels.
    `LEAST_MOVABLE` such groups have at least ``2 ** 5`` distinct labelings: enough for a p-value below .05.

    Parameters
    ----------
    groups, parts
        As for `exchange_groups`.
    labels
        ``[N]``.

    Returns
    -------
    ndarray
        bool ``[G]``, in the order of ``np.unique(groups)``.
    """
    group, of_part, size = _blocks(groups, parts)
    _, value = np.unique(np.asarray(labels), return_inverse=True)
    counts = np.zeros((len(size), int(value.max(initial=-1)) + 1), dtype=np.int64)
    np.add.at(counts, (group, value), 1)
    mixed = (counts > 0).sum(axis=1) > 1
    _, stratum = np.unique(np.column_stack([of_part, size]), axis=0, return_inverse=True)
    _, content = np.unique(counts, axis=0, return_inverse=True)
    stratum, content = stratum.ravel(), content.ravel()
    contents_of = np.zeros(int(stratum.max(initial=-1)) + 1, dtype=np.int64)
    pairs = np.unique(np.column_stack([stratum, content]), axis=0)
    np.add.at(contents_of, pairs[:, 0], 1)
    return mixed | (contents_of[stratum] > 1)


def _blocks(groups: Sequence[Hashable] | np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the index of each row's group ``[N]``, and the part and the number of rows of each group ``[G]``."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    _, part = np.unique(np.asarray(parts), return_inverse=True)
    size = np.bincount(group)
    of_part = np.zeros(len(size), dtype=np.int64)
    of_part[group] = part
    return group, of_part, size
