"""Controls: what a probe reaches on labels that mean nothing."""

from __future__ import annotations

import numpy as np


def shuffle_labels(labels: np.ndarray, groups: np.ndarray, parts: np.ndarray, seed: int | list[int]) -> np.ndarray:
    """Shuffle labels [N] in a way that keeps what splits and groups fix, and nothing else.

    Within each part (a fold, or the held-out rows) the groups' blocks of labels are dealt over the groups of that part
    in random order, in random order within each block too. So every part keeps its class counts, labels that were alike
    within a group stay alike (exactly for groups of equal size), and no label keeps its features: a probe that still
    beats chance has learnt from the number of its parameters or from a leak. Shuffling only within groups would leave
    every label in place that is constant over its image; shuffling rows freely would make the control's errors
    independent where the real ones are not.

    Parameters
    ----------
    labels
        [N], any dtype.
    groups, parts
        [N], the group and the part of each row; a group lies in one part.
    seed
        Of the random order.

    Returns
    -------
    The shuffled labels [N], same dtype.
    """
    rng = np.random.default_rng(seed)
    _, group = np.unique(groups, return_inverse=True)
    rank = rng.permutation(int(group.max()) + 1) if len(group) else np.empty(0, dtype=np.int64)
    source = np.lexsort((rng.random(len(labels)), rank[group], parts))
    target = np.lexsort((group, parts))
    shuffled = np.empty_like(labels)
    shuffled[target] = labels[source]
    return shuffled


def majority_accuracy(labels: np.ndarray) -> float:
    """Return the plain accuracy of always saying the more frequent class of labels [N] in 0, 1."""
    share = float(np.mean(labels))
    return max(share, 1 - share)
