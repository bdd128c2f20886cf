"""Labels without information: the same labels or pairs, exchanged at random between images."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import PatchError
from groundscope.core.permutations import LEAST_MOVABLE, exchange_groups, movable_groups
from groundscope.core.text import format_count


def shuffle_mask(
    mask: np.ndarray, seed: int, among: np.ndarray | None = None, *, groups: Sequence[Hashable] | None = None
) -> np.ndarray:
    """Return a boolean mask ``[N]`` with the same number of true entries and shuffled labels.

    Groups with equal numbers of rows exchange their labels as a whole (`groundscope.core.permutations.exchange_groups`),
    because rows of one image share their content: labels that are constant within an image remain constant.

    Parameters
    ----------
    mask
        The labels.
    seed
        Seed of the shuffle.
    among
        Boolean ``[N]``: the examples whose labels are shuffled; the others keep theirs. All by default.
    groups
        ``[N]``: the group of each row; None if every row is a separate group.

    Raises
    ------
    PatchError
        If fewer than `groundscope.core.permutations.LEAST_MOVABLE` groups can take other labels.
    """
    indices = np.flatnonzero(np.ones(len(mask), bool) if among is None else among)
    names = np.arange(len(mask)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    constant = np.zeros(len(indices), dtype=np.int64)
    movable = movable_groups(names[indices], constant, mask[indices])
    if movable.sum() < LEAST_MOVABLE:
        msg = (
            f"labels cannot be shuffled: only {int(movable.sum())} of {format_count(len(movable), 'group')} can take "
            f"other labels, {LEAST_MOVABLE} are needed; only groups with equal numbers of examples exchange labels, so "
            "trace more images"
        )
        raise PatchError(msg)
    shuffled_mask = mask.copy()
    shuffled_mask[indices] = mask[indices][exchange_groups(names[indices], constant, seed)]
    return shuffled_mask


def swap_sides(pairs: Sequence[CounterfactualPair], seed: int) -> list[CounterfactualPair]:
    """Return pairs with clean and corrupt exchanged in a random half of them, so that the sides carry no information.

    Pairs of one image are exchanged together, because the difference between their sides is similar: groups are taken in
    random order until half of the pairs are exchanged. With fewer than `groundscope.core.permutations.LEAST_MOVABLE`
    groups, pairs are exchanged individually.
    """
    rng = np.random.default_rng(seed)
    groups = [p.group for p in pairs]
    names = list(dict.fromkeys(groups))
    if len(names) < LEAST_MOVABLE:
        exchange = rng.permutation(len(pairs)) < len(pairs) // 2
    else:
        remaining, chosen = len(pairs) // 2, set[str]()
        for name in (names[i] for i in rng.permutation(len(names))):
            if groups.count(name) <= remaining:
                chosen.add(name)
                remaining -= groups.count(name)
        exchange = np.array([name in chosen for name in groups])
    return [replace(p, clean=p.corrupt, corrupt=p.clean) if t else p for p, t in zip(pairs, exchange, strict=True)]
