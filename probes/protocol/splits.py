"""Splits that never divide a group: a held-out part and folds, balanced over all concepts jointly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.text import format_count


def assign_parts(
    groups: Sequence[str] | np.ndarray, labels: np.ndarray, shares: Sequence[float] | np.ndarray, seed: int
) -> np.ndarray:
    """Assign whole groups to parts so that each class of each concept is divided by the given shares.

    Parameters
    ----------
    groups
        [N], the group of each row.
    labels
        Float [N] or [N, K]: 0, 1, or NaN where a concept is undefined.
    shares
        Positive share of rows of each part; normalized to sum 1.
    seed
        Equal seeds and data give equal parts.

    Returns
    -------
    Part number int64 [N].

    Raises
    ------
    ProbeError
        If the lengths differ or a share is not positive.

    Notes
    -----
    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011) with groups in place of rows: the rarest class
    with unassigned groups is processed next: its groups, largest first, go to the part with the largest deficit of it.
    """
    names = np.asarray(groups)
    y = np.asarray(labels, dtype=np.float64).reshape(len(labels), -1)
    portions = np.asarray(shares, dtype=np.float64)
    if len(names) != len(y):
        msg = f"{len(names)} groups and {format_count(len(y), 'row')} of labels: give one group for each row"
        raise ProbeError(msg)
    if portions.ndim != 1 or not len(portions) or not (np.isfinite(portions).all() and (portions > 0).all()):
        msg = f"shares {portions.tolist()} must be positive numbers, one for each part"
        raise ProbeError(msg)
    _, of_row = np.unique(names, return_inverse=True)
    n_groups = int(of_row.max()) + 1 if len(of_row) else 0
    # Rows of each class in each group; the last column counts all rows, so that groups without labels are assigned too.
    members = np.column_stack([y == 0, y == 1, np.ones(len(y), dtype=bool)]).astype(np.float64)
    counts = np.zeros((n_groups, members.shape[1]))
    np.add.at(counts, of_row, members)
    deficit = np.outer(portions / portions.sum(), counts.sum(axis=0))  # [parts, classes]
    rng = np.random.default_rng(seed)
    # Random order and random tie-breaking: seeds give different splits of equal balance.
    order = rng.permutation(n_groups)
    tie_break = rng.random((n_groups, len(portions)))
    part = np.full(n_groups, -1)
    remaining = counts.sum(axis=0)
    while True:
        open_classes = np.flatnonzero(remaining > 0)
        if not open_classes.size:
            break
        rarest = open_classes[np.argmin(remaining[open_classes])]
        unassigned = order[(part[order] < 0) & (counts[order, rarest] > 0)]
        for group in unassigned[np.argsort(-counts[unassigned, rarest], kind="stable")]:
            # Largest deficit of this class; then largest deficit of rows; then random.
            choice = np.lexsort((tie_break[group], -deficit[:, -1], -deficit[:, rarest]))[0]
            part[group] = choice
            deficit[choice] -= counts[group]
            remaining -= counts[group]
    return part[of_row].astype(np.int64)


def grouped_split(
    groups: Sequence[str] | np.ndarray, labels: np.ndarray, test_fraction: float = 0.3, seed: int = 0
) -> np.ndarray:
    """Return the held-out rows, bool [N]: about `test_fraction` of the rows of each class, whole groups only.

    Raises
    ------
    ProbeError
        If `test_fraction` is not between 0 and 1, or the lengths differ.
    """
    if not 0 < test_fraction < 1:
        msg = f"test_fraction={test_fraction} must be between 0 and 1, for example 0.3"
        raise ProbeError(msg)
    return assign_parts(groups, labels, (1 - test_fraction, test_fraction), seed) == 1


def grouped_folds(groups: Sequence[str] | np.ndarray, labels: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Return the fold of each row, int64 [N] in ``0 .. folds-1``, without dividing groups.

    Raises
    ------
    ProbeError
        If there are fewer than 2 folds, fewer groups than folds, or the lengths differ.
    """
    n_groups = len(np.unique(np.asarray(groups)))
    if folds < 2 or n_groups < folds:
        msg = (
            f"{folds} folds of {format_count(n_groups, 'group')}: give at least 2 folds, and no more folds than groups"
        )
        raise ProbeError(msg)
    return assign_parts(groups, labels, np.ones(folds), seed)


def is_number(labels: np.ndarray) -> bool:
    """Whether defined labels [N] are numbers to predict, not classes: one of them is neither 0 nor 1."""
    return bool((~np.isnan(labels) & (labels != 0) & (labels != 1)).any())


def strata(labels: np.ndarray) -> np.ndarray:
    """Return the classes that splits balance, [N, K] or [N] in 0, 1 and NaN: of numbers, whether they are above their median."""
    y = np.array(labels, dtype=np.float64)
    columns = y.reshape(len(y), -1)  # a view
    for k in range(columns.shape[1]):
        if is_number(columns[:, k]):
            defined = ~np.isnan(columns[:, k])
            values = columns[defined, k]
            middle = np.median(values)
            # Of many equal numbers, those at the median belong to the side that divides the rows more evenly.
            above, least = values > middle, values >= middle
            columns[defined, k] = above if above.sum() > 0 and above.sum() + least.sum() >= len(values) else least
    return y


def groups_needed(folds: int, test_fraction: float) -> int:
    """Return the number of groups per class that allow one in each fold and two in the held-out part."""
    return max(math.ceil(folds / (1 - test_fraction)), math.ceil(2 / test_fraction))


def support_problem(concept: str, labels: np.ndarray, groups: np.ndarray, needed: int) -> str | None:
    """Return a message why the defined labels [N] of a concept cannot be split by group, or None if they can."""
    if is_number(labels):
        if len(np.unique(labels[~np.isnan(labels)])) < 2:
            return (
                f"'{concept}' is {labels[~np.isnan(labels)][0]:g} on all rows where it is defined; numbers must differ"
            )
        labels, concept = strata(labels), f"{concept} (above its median)"
    rows = {value: labels == value for value in (0.0, 1.0)}
    n_rows = {value: int(mask.sum()) for value, mask in rows.items()}
    n_groups = {value: len(np.unique(groups[mask])) for value, mask in rows.items()}
    if not sum(n_rows.values()):
        return f"'{concept}' is undefined on all used rows"
    for value, count in n_rows.items():
        if not count:
            return (
                f"'{concept}' is {1 - value:.0f} on all {format_count(n_rows[1 - value], 'row')} where it is defined; "
                "both classes are needed"
            )
    for value, count in n_groups.items():
        if count < needed:
            return (
                f"class {value:.0f} of '{concept}' is in {format_count(count, 'group')} "
                f"({format_count(n_rows[value], 'row')}), {needed} are needed (class {1 - value:.0f}: "
                f"{format_count(n_groups[1 - value], 'group')})"
            )
    return None
