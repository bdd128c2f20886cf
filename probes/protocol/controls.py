"""Controls: shuffled and random labels, on which probes should score at chance."""

from __future__ import annotations

import numpy as np

from groundscope.core.permutations import exchange_groups, movable_groups


def shuffle_labels(labels: np.ndarray, groups: np.ndarray, parts: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Shuffle labels [N, ...] while preserving the structure of splits and groups.

    Within each part (a fold, or the held-out rows) groups with equally many rows exchange their blocks of labels, with
    random order within each block (`groundscope.core.permutations.exchange_groups` explains why the resulting p-values are
    valid). Every part keeps its class counts, every block moves as a whole to one group, and labels that were equal within
    a group stay equal: a probe that still scores above chance overfits or uses a leak. Shuffling only within groups would
    not change labels that are constant over an image; shuffling rows freely, or blocks between groups of different sizes,
    would make the shuffled labels less correlated within groups than the real ones.

    A group with a unique size in its part keeps its labels, up to their order. `movable` counts the groups whose labels can
    change.

    Parameters
    ----------
    labels
        [N, ...], any dtype; further axes move with their row.
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
    """Return the number of groups that a shuffle can give other labels, and the number of groups.

    Parameters
    ----------
    labels, groups, parts
        As for `shuffle_labels`, labels [N].
    scheme
        ``blocks`` for `shuffle_labels`, ``within`` for `shuffle_within`, under which groups with mixed labels can change.
    """
    if scheme == "within":
        parts = np.unique(groups, return_inverse=True)[1]  # each group is its own part
    can = movable_groups(groups, parts, labels)
    return int(can.sum()), len(can)


def shuffle_within(labels: np.ndarray, groups: np.ndarray, parts: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Permute labels [N, ...] among the rows of each group, which preserves information about the group.

    A label that is constant over its group does not change. `parts` is not used (same signature as `shuffle_labels`): a
    group belongs to one part, so that parts keep their class counts.
    """
    del parts
    rng = np.random.default_rng(seed)
    _, group = np.unique(groups, return_inverse=True)
    source, target = np.lexsort((rng.random(len(labels)), group)), np.argsort(group, kind="stable")
    shuffled = np.empty_like(labels)
    shuffled[target] = labels[source]
    return shuffled


def control_labels(types: np.ndarray, share: float, seed: int | list[int]) -> np.ndarray:
    """Assign each type a random label: the control task of Hewitt and Liang (2019), which requires memorizing types.

    Parameters
    ----------
    types
        [N], the type of each row, such as its question.
    share
        Approximate share of positive types.
    seed
        Of the labels.

    Returns
    -------
    float64 [N] in 0, 1; both occur if there are at least two types.
    """
    rng = np.random.default_rng(seed)
    names, of_row = np.unique(types, return_inverse=True)
    n_positive = int(np.clip(round(share * len(names)), 1, max(1, len(names) - 1)))
    label = np.zeros(len(names))
    label[rng.permutation(len(names))[:n_positive]] = 1
    return label[of_row]


def majority_accuracy(labels: np.ndarray) -> float:
    """Return the plain accuracy of always predicting the more frequent class of labels [N] in 0, 1."""
    share = float(np.mean(labels))
    return max(share, 1 - share)
