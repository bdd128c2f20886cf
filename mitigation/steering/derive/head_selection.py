"""Select heads by the held-out accuracy of a logistic probe on each head's z."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from groundscope.core.errors import PatchError
from groundscope.core.progress import progress_bar
from groundscope.core.text import format_count
from mitigation.steering.places import Key

Fold = tuple[np.ndarray, np.ndarray]
"""Boolean masks of training and validation rows."""


def probe_accuracies(
    keys: Sequence[Key],
    read: Callable[[Key], np.ndarray],
    truth: np.ndarray,
    folds: Sequence[Fold],
    *,
    progress: bool | None = None,
) -> dict[Key, float]:
    """Return each place's accuracy of scikit-learn's logistic regression on validation rows, mean over folds.

    Parameters
    ----------
    keys
        The places.
    read
        Function that returns the activations of a place, ``[n, d]``.
    truth
        Labels, boolean ``[n]``.
    folds
        At least one fold.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    PatchError
        If a fold's training rows have only one label, or it has no validation rows.
    """
    from sklearn.linear_model import LogisticRegression

    for train, validation in folds:
        if len(set(truth[train].tolist())) < 2 or not validation.any():
            msg = (
                f"probes cannot be fitted: {int(truth[train].sum())} positive and {int((~truth[train]).sum())} negative "
                f"training examples, {format_count(int(validation.sum()), 'validation example')}; give examples of more images"
            )
            raise PatchError(msg)
    accuracy_of: dict[Key, float] = {}
    with progress_bar(progress) as bar:
        for key in bar.track(keys, description="probing heads"):
            x = read(key)
            scores = []
            for train, validation in folds:
                # No standardization of x, as in the releases of ITI and ICT.
                probe = LogisticRegression(max_iter=10_000).fit(x[train], truth[train])
                scores.append(float((probe.predict(x[validation]) == truth[validation]).mean()))
            accuracy_of[key] = float(np.mean(scores))
    return accuracy_of


def best(accuracies: Mapping[Key, float], top: int) -> list[Key]:
    """Return the `top` places of highest accuracy; ties are in the order of the mapping."""
    if top < 1:
        msg = f"top={top}: it must be at least 1"
        raise PatchError(msg)
    return sorted(accuracies, key=lambda key: -accuracies[key])[:top]


def group_folds(groups: Sequence[Hashable], count: int, seed: int) -> list[Fold]:
    """Divide rows into folds at random by `seed`, each group in one fold; raises `PatchError` for too few groups."""
    names = sorted(set(groups), key=str)
    if len(names) < count:
        msg = f"{format_count(len(names), 'image')} cannot be divided into {count} folds; give at least {count}"
        raise PatchError(msg)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[k]: i % count for i, k in enumerate(shuffled)}
    fold_of_row = np.array([fold_of[g] for g in groups])
    return [(fold_of_row != i, fold_of_row == i) for i in range(count)]
