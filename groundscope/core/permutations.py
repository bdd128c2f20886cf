"""Permutations of labels whose rows come in groups, such as the questions of one image.

A permutation test and a control with shuffled labels ask what happens where labels have nothing to do with the features.
Rows of a group share features and labels, so labels move as blocks: a group takes the labels of another whole group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

LEAST_MOVABLE = 10
"""Groups that must be able to move for shuffled labels to mean anything; see `movable_groups`."""


def exchange_groups(
    groups: Sequence[Hashable] | np.ndarray, parts: np.ndarray, seed: int | list[int] | np.random.Generator
) -> np.ndarray:
    """Return for each row the row whose label it takes, where groups of one part and one size exchange their rows.

    Parameters
    ----------
    groups
        ``[N]``: the group of each row.
    parts
        ``[N]``: the part of each row (a fold, the held-out rows); a group belongs to one part.
    seed
        Of the random order.

    Returns
    -------
    ndarray
        int64 ``[N]``, a permutation: ``labels[result]`` are the exchanged labels. Every group takes all rows of one group
        of its part and size, in random order.

    Notes
    -----
    Why p-values from it are valid. The permutations that map every group onto a group of its part and size, in any order
    of rows, are a group in the algebraic sense (a product of wreath products ``S_m wr S_k``, one for each part and size m
    with k groups), and this function draws from it uniformly. If labels do not depend on features, then given
    features, parts and sizes the labels of groups of one size are exchangeable, and so are those within a group: the
    distribution of the labels is the same under every such permutation. Then the rank of the true labels' statistic among
    those of B drawn permutations is uniform up to ties, and ``(1 + b) / (1 + B)`` is at most a with probability at most a,
    whatever the statistic is (Hemerik & Goeman 2018, TEST 27:811, theorem 2). Exchanging labels among groups of unlike
    sizes is no such permutation: it has to cut blocks, so that permuted labels agree less within groups than true ones,
    and true ones look exceptional without reason.

    A group of a size that no other group of its part has, keeps its labels, up to their order.
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
    """Return which groups `exchange_groups` can give other labels.

    A group can where its own rows differ in their labels, or where another group of its part and size has other labels.
    `LEAST_MOVABLE` such groups have at least ``2 ** 5`` different labelings: enough for a p-value under .05.

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
    """Return the number of each row's group ``[N]``, and the part and number of rows of each group ``[G]``."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    _, part = np.unique(np.asarray(parts), return_inverse=True)
    size = np.bincount(group)
    of_part = np.zeros(len(size), dtype=np.int64)
    of_part[group] = part
    return group, of_part, size
