"""The split of a grid's rows, and its tasks: concepts with their shuffled controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.permutations import LEAST_MOVABLE
from groundscope.core.text import format_count
from probes.protocol.controls import movable, shuffle_labels
from probes.protocol.scoring import resample_groups
from probes.protocol.splits import grouped_folds, grouped_split, groups_needed, is_number, strata, support_problem


class UnplaceableError(ProbeError):
    """No concept can be placed by a split into whole groups; `reasons` has one for each."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(f"no concept can be fitted: {'; '.join(reasons.values())}")
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class SplitRows:
    """The rows of a grid, with their split: used examples with a non-empty token selection."""

    ids: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    """float64 [N, K]: 0, 1 or NaN, or numbers."""
    fold: np.ndarray
    """int64 [N]: fold of a training row, -1 for a held-out row."""


@dataclass(frozen=True)
class Task:
    """Concepts that are defined on the same rows, with their true labels and the shuffled labels of their controls."""

    concepts: tuple[int, ...]
    """Indices of the concepts in the grid."""
    train: np.ndarray
    """Row numbers of the training rows."""
    test: np.ndarray
    """Row numbers of the held-out rows."""
    fold: np.ndarray
    """Fold of each training row."""
    labels: np.ndarray
    """float64 [Q, n_train]: true labels of the concepts, then their shuffled labels, draw by draw."""
    test_labels: np.ndarray
    """float64 [Q, n_test], in the same order."""
    test_groups: np.ndarray
    """int64 [n_test]: number of the group of each held-out row."""
    resamples: np.ndarray
    """float32 [B, G]: count of each held-out group in each resample."""
    movable: tuple[tuple[int, int], ...]
    """Per concept, the number of groups that shuffles can give other labels, and the number of groups."""
    numbers: bool = False
    """Whether the labels are numbers to predict."""

    def has_control(self, at: int) -> bool:
        """Whether shuffles of a concept are a valid control: at least 10 groups, and half of all groups, are movable."""
        n_movable, n_groups = self.movable[at]
        return n_movable >= LEAST_MOVABLE and 2 * n_movable >= n_groups


def split_rows(
    ids: np.ndarray, groups: np.ndarray, labels: np.ndarray, folds: int, test_fraction: float, seed: int
) -> SplitRows:
    """Hold out whole groups and assign the others to folds, the same for all concepts: labels [N, K] -> `SplitRows`."""
    classes = strata(labels)
    held_out = grouped_split(groups, classes, test_fraction, seed)
    fold = np.full(len(ids), -1)
    fold[~held_out] = grouped_folds(groups[~held_out], classes[~held_out], folds, seed)
    return SplitRows(ids, groups, labels, fold)


def build_tasks(
    table: SplitRows, concepts: Sequence[str], folds: int, control: int, resamples: int, seed: int
) -> tuple[Task, ...]:
    """Group concepts that are defined on the same rows, so that they share features and resamples."""
    _check_placed(table, concepts, folds)
    members_by_rows: dict[tuple[bytes, bool], list[int]] = {}
    for k in range(len(concepts)):
        key = np.isnan(table.labels[:, k]).tobytes(), is_number(table.labels[:, k])
        members_by_rows.setdefault(key, []).append(k)
    tasks = []
    for (_, numbers), members in members_by_rows.items():
        rows = np.flatnonzero(~np.isnan(table.labels[:, members[0]]))
        true = table.labels[rows][:, members].T
        shuffled = [
            shuffle_labels(true[at], table.groups[rows], table.fold[rows], [seed, draw, k])
            for draw in range(control)
            for at, k in enumerate(members)
        ]
        labels = np.concatenate([true, *(s[None] for s in shuffled)])
        training = table.fold[rows] >= 0
        names, of_row = np.unique(table.groups[rows[~training]], return_inverse=True)
        counts = resample_groups(names, resamples, [seed, members[0]])
        tasks.append(
            Task(
                tuple(members),
                rows[training],
                rows[~training],
                table.fold[rows[training]],
                labels[:, training],
                labels[:, ~training],
                of_row,
                counts,
                tuple(movable(row, table.groups[rows], table.fold[rows]) for row in true),
                numbers,
            )
        )
    return tuple(tasks)


def _check_placed(table: SplitRows, concepts: Sequence[str], folds: int) -> None:
    """Raise `ProbeError` if the split gave a class of a concept too few held-out groups or folds."""
    problems = [p for k, c in enumerate(concepts) if (p := _placement_problem(table, k, c, folds))]
    if problems:
        msg = (
            f"{'; '.join(problems)}; groups cannot be divided, so exclude the concept, add data, or change test_fraction, "
            f"folds or seed"
        )
        raise ProbeError(msg)


def _placement_problem(table: SplitRows, k: int, concept: str, folds: int) -> str:
    """Return a sentence that names each class with too few groups for a part of the split; empty if each class has enough."""
    problems = []
    classes = strata(table.labels[:, k])
    for value in (0, 1):
        rows = classes == value
        tested = len(np.unique(table.groups[rows & (table.fold < 0)]))
        in_folds = sum(bool((rows & (table.fold == f)).any()) for f in range(folds))
        if tested < 2 or in_folds < 2:
            total = len(np.unique(table.groups[rows]))
            problems.append(
                f"class {value} of '{concept}', in {format_count(total, 'group')}, got {tested} of the held-out groups "
                f"(2 are needed) and {in_folds} of the {folds} folds (2 are needed)"
            )
    return "; ".join(problems)


def split_possible(
    ids: np.ndarray,
    groups: np.ndarray,
    labels: np.ndarray,
    concepts: Sequence[str],
    folds: int,
    test_fraction: float,
    seed: int,
) -> tuple[list[int], dict[str, str]]:
    """Find the concepts that one split can place, leaving out as few as possible.

    One split serves all concepts, so each concept that goes changes the split of the others: of those that cannot be placed
    the rarest goes first, and the rest is split again.

    Parameters
    ----------
    ids, groups, labels, folds, test_fraction, seed
        As for `split_rows`; labels float64 ``[N, K]``.
    concepts
        K names.

    Returns
    -------
    tuple
        Numbers of the concepts that can be fitted, and for each of the others the reason.

    Raises
    ------
    UnplaceableError
        Where no concept can be fitted.
    """
    needed = groups_needed(folds, test_fraction)
    problems = [support_problem(c, labels[:, k], groups, needed) for k, c in enumerate(concepts)]
    left_out = {c: p for c, p in zip(concepts, problems, strict=True) if p}
    used = [k for k, p in enumerate(problems) if not p]
    while used:
        table = split_rows(ids, groups, labels[:, used], folds, test_fraction, seed)
        unplaced = {k: p for at, k in enumerate(used) if (p := _placement_problem(table, at, concepts[k], folds))}
        if not unplaced:
            break
        classes = strata(labels)
        rarest = min(unplaced, key=lambda k: min(len(np.unique(groups[classes[:, k] == value])) for value in (0, 1)))
        left_out[concepts[rarest]] = unplaced[rarest]
        used.remove(rarest)
    if not used:
        raise UnplaceableError(left_out)
    return used, left_out
