"""Controls: what a probe reaches on labels that mean nothing."""

from __future__ import annotations

import numpy as np

from groundscope.core.permutations import exchange_groups, movable_groups


def shuffle_labels(labels: np.ndarray, groups: np.ndarray, parts: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Shuffle labels [N, ...] in a way that keeps what splits and groups fix, and nothing else.

    Within each part (a fold, or the held-out rows) groups with equally many rows exchange their blocks of labels, in random
    order within each block too (`groundscope.core.permutations.exchange_groups`, which says why p-values from it are
    valid). So every part keeps its class counts, every block goes whole to one group, and labels that were alike within a
    group stay alike: a probe that still beats chance has learned from the number of its parameters or from a leak.
    Shuffling only within groups would leave every label in place that is constant over its image; shuffling rows freely, or
    blocks across the borders of groups of unlike sizes, would make the shuffled labels agree less within groups than the
    real ones.

    A group whose size no other group of its part has keeps its labels, up to their order: `movable` counts the others.

    Parameters
    ----------
    labels
        [N, ...], any dtype; further axes go with their row.
    groups, parts
        [N], the group and the part of each row; a group belongs to one part.
    seed
        Of the random order.

    Returns
    -------
    The shuffled labels, same shape and dtype.
    """
    return labels[exchange_groups(groups, parts, seed)]


def movable(labels: np.ndarray, groups: np.ndarray, parts: np.ndarray, scheme: str = "blocks") -> tuple[int, int]:
    """Return how many groups a shuffle can give other labels, and how many groups there are.

    Parameters
    ----------
    labels, groups, parts
        As for `shuffle_labels`, labels [N].
    scheme
        ``blocks`` for `shuffle_labels`, ``within`` for `shuffle_within`, under which groups of mixed labels can change.
    """
    if scheme == "within":
        parts = np.unique(groups, return_inverse=True)[1]  # each group by itself
    can = movable_groups(groups, parts, labels)
    return int(can.sum()), len(can)


def shuffle_within(labels: np.ndarray, groups: np.ndarray, parts: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Permute labels [N, ...] among the rows of each group: keeps whatever the group itself gives away.

    A label that is constant over its group stays as it is. `parts` are there to be called as `shuffle_labels` is: a group
    lies in one part, so class counts of parts are kept.
    """
    del parts
    rng = np.random.default_rng(seed)
    _, group = np.unique(groups, return_inverse=True)
    source, target = np.lexsort((rng.random(len(labels)), group)), np.argsort(group, kind="stable")
    shuffled = np.empty_like(labels)
    shuffled[target] = labels[source]
    return shuffled


def control_labels(types: np.ndarray, share: float, seed: int | list[int]) -> np.ndarray:
    """Give each type a random label: the control task of Hewitt and Liang (2019), learnt only by knowing types by heart.

    Parameters
    ----------
    types
        [N], what a row is an instance of, such as its question.
    share
        Of positives among the types, about.
    seed
        Of the labels.

    Returns
    -------
    float64 [N] in 0, 1; both occur where there are two types or more.
    """
    rng = np.random.default_rng(seed)
    names, of_row = np.unique(types, return_inverse=True)
    n_positive = int(np.clip(round(share * len(names)), 1, max(1, len(names) - 1)))
    label = np.zeros(len(names))
    label[rng.permutation(len(names))[:n_positive]] = 1
    return label[of_row]


def majority_accuracy(labels: np.ndarray) -> float:
    """Return the plain accuracy of always saying the more frequent class of labels [N] in 0, 1."""
    share = float(np.mean(labels))
    return max(share, 1 - share)
