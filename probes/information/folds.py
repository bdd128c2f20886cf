"""Folds of whole groups, and folds inside the training rows of each fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.text import format_count
from probes.protocol.splits import grouped_folds


@dataclass(frozen=True, eq=False)
class Folds:
    """Nested folds of N rows; no group is divided."""

    outer: np.ndarray
    """int64 [N]: the fold in which a row is held out."""
    inner: np.ndarray
    """int64 [F, N]: the inner fold of each training row of fold f, -1 for its held-out rows."""

    @property
    def count(self) -> int:
        """Number of outer folds, F."""
        return len(self.inner)


def make_folds(
    classes: np.ndarray, names: Sequence[str], groups: np.ndarray, folds: int, inner_folds: int, seed: int
) -> Folds:
    """Assign whole groups to nested folds, so that every training part has every class.

    Parameters
    ----------
    classes, names
        int [N], in 0 .. K - 1, and the K names.
    groups
        str [N].
    folds, inner_folds
        Numbers of folds.
    seed
        Seed of the assignment.

    Raises
    ------
    ProbeError
        If there is one class only, or a class is in too few groups.
    """
    if len(names) < 2:
        msg = (
            f"all {format_count(len(classes), 'row')} are of class '{names[0]}': information needs two classes or more"
        )
        raise ProbeError(msg)
    if folds < 2 or inner_folds < 2:
        msg = f"folds={folds} and inner_folds={inner_folds} must be 2 or more"
        raise ProbeError(msg)
    needed = max(folds, inner_folds + 1)
    counts = [len(np.unique(groups[classes == k])) for k in range(len(names))]
    few = [f"'{name}' is in {format_count(n, 'group')}" for name, n in zip(names, counts, strict=True) if n < needed]
    if few:
        msg = (
            f"class {', class '.join(few)}; {folds} folds of whole groups with {inner_folds} inner folds need {needed} of "
            "each class: add data, exclude the class with rows=…, or use fewer folds"
        )
        raise ProbeError(msg)
    labels = np.eye(len(names))[classes]
    outer = grouped_folds(groups, labels, folds, seed)
    inner = np.full((folds, len(classes)), -1)
    for fold in range(folds):
        train = outer != fold
        inner[fold, train] = grouped_folds(groups[train], labels[train], inner_folds, seed)
    for name, k in zip(names, range(len(names)), strict=True):
        rows = classes == k
        parts = [(inner[f] >= 0) & (inner[f] != i) for f in range(folds) for i in range(inner_folds)]
        if not all((part & rows).any() for part in parts):
            msg = (
                f"class '{name}', in {format_count(counts[k], 'group')}, is missing from the training rows of a fold: add "
                "data, exclude the class with rows=…, or use fewer folds"
            )
            raise ProbeError(msg)
    return Folds(outer, inner)
