"""Which heads know: held-out accuracy of a logistic probe on each head's z."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from groundscope.core.errors import PatchError
from groundscope.core.progress import progress_bar
from mitigation.steering.placement import Key

Fold = tuple[np.ndarray, np.ndarray]
"""Boolean masks of training and validation rows."""


def probe_accuracies(
    keys: Sequence[Key], read: Callable[[Key], np.ndarray], truth: np.ndarray, folds: Sequence[Fold]
) -> dict[Key, float]:
    """Return for each place the accuracy of scikit-learn's logistic regression on held-out rows, mean over folds.

    Parameters
    ----------
    keys
        The places.
    read
        Gives the activations of one, ``[n, d]``.
    truth
        Boolean ``[n]``.
    folds
        At least one.

    Raises
    ------
    PatchError
        Where a fold's training rows are of one side only, or it has no validation rows.
    """
    from sklearn.linear_model import LogisticRegression

    for train, held in folds:
        if len(set(truth[train].tolist())) < 2 or not held.any():
            msg = (
                f"probes cannot be fitted: {int(truth[train].sum())} positive and {int((~truth[train]).sum())} negative "
                f"training examples, {int(held.sum())} held out; give examples of more images"
            )
            raise PatchError(msg)
    found: dict[Key, float] = {}
    with progress_bar() as bar:
        for key in bar.track(keys, description="probing heads"):
            x = read(key)
            scores = []
            for train, held in folds:
                # Without standardisation, as the releases of ITI and ICT do it; the unit of x is the model's own.
                probe = LogisticRegression(max_iter=10_000).fit(x[train], truth[train])
                scores.append(float((probe.predict(x[held]) == truth[held]).mean()))
            found[key] = float(np.mean(scores))
    return found


def best(accuracies: Mapping[Key, float], top: int) -> list[Key]:
    """Return the `top` places of highest accuracy; of equals the first of the mapping."""
    if top < 1:
        msg = f"top={top}: choose at least one head"
        raise PatchError(msg)
    return sorted(accuracies, key=lambda key: -accuracies[key])[:top]


def group_folds(groups: Sequence[Hashable], count: int, seed: int) -> list[Fold]:
    """Divide rows into folds that no group straddles, at random but the same for a seed; raises `PatchError` for too few."""
    names = sorted(set(groups), key=str)
    if len(names) < count:
        msg = f"{len(names)} images cannot be divided into {count} parts: give more"
        raise PatchError(msg)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    part = {names[k]: i % count for i, k in enumerate(shuffled)}
    own = np.array([part[g] for g in groups])
    return [(own != i, own == i) for i in range(count)]
