"""Which concept is followed along the path of a store, if the user names none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from concepts.concept import LEVELS
from groundscope.core.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationStore

MIN_CLASS = 6
"""Smallest number of images of each class: five folds, with three inner ones."""
EXCLUSIVE = 0.9
"""Labels are classes if this share of the rows has exactly one of them."""


@dataclass(frozen=True, eq=False)
class PathConcept:
    """Label columns of which one is true in each row, or one column of yes and no; and where the image has them."""

    names: tuple[str, ...]
    rows: np.ndarray
    """bool ``[n]``: rows of the store."""
    tokens: str
    """Tokens of the image."""


def choose_concept(store: ActivationStore, limit: int) -> PathConcept:
    """Return the concept of the store with the most classes, else the most balanced one; at most `limit` rows of whole images.

    Classes of an object (such as its colors) are read at the object's box, presence of an object at the whole image.

    Raises
    ------
    DataError
        If no concept has enough images of two classes, or the store has no tokens of the image.
    """
    frame = store.frame()
    stored = {str(a.tokens) for a in store.arrays if a.stack in {"vision", "projector", "decoder"}}
    if not stored & {"object:mean", "image:mean"}:
        msg = "the store has no tokens of the image; trace resid_post and projector.out at object:mean or image:mean"
        raise DataError(msg)
    if "object:mean" in stored:
        at_object = _has_object(store)
        candidates = [c for level in LEVELS for c in _class_sets(frame, level, at_object)]
        if candidates:
            names, rows = max(candidates, key=lambda c: (len(c[0]), c[1].sum()))
            return PathConcept(names, _limited(rows, frame, limit), "object:mean")
    if "image:mean" not in stored:
        msg = "no label has exclusive classes at boxes of objects; trace image:mean for labels of whole images"
        raise DataError(msg)
    concept = choose_object(frame)
    return PathConcept(concept.names, _limited(concept.rows, frame, limit), "image:mean")


def choose_object(frame: pd.DataFrame) -> PathConcept:
    """Return the object whose presence is most balanced over images; raises `DataError` if no object has enough images."""
    groups = frame["group"].astype(str).to_numpy()
    best, most = "", 0
    for name in _columns(frame, "object"):
        values = frame[name].to_numpy(float)
        rarer = min(len(set(groups[values == v])) for v in (0, 1))
        if rarer > most:
            best, most = name, rarer
    if most < 2 * MIN_CLASS:
        msg = f"no object is present in {2 * MIN_CLASS} images and absent from as many; use more images, or labels of objects"
        raise DataError(msg)
    return PathConcept((best,), frame[best].notna().to_numpy(), "image:mean")


def _columns(frame: pd.DataFrame, level: str) -> list[str]:
    return [str(c) for c in frame.columns if str(c).startswith(f"{level}:") and str(c) != f"{level}:named"]


def _class_sets(frame: pd.DataFrame, level: str, usable: np.ndarray) -> list[tuple[tuple[str, ...], np.ndarray]]:
    """Return sets of labels of a level of which one is true, with their rows; one set for labels that are defined together."""
    columns = _columns(frame, level)
    table = frame[columns].to_numpy(float)
    groups = frame["group"].astype(str).to_numpy()
    sets = []
    of_level = (frame["level"] == level).to_numpy() & usable
    for defined in sorted({tuple(row) for row in (~np.isnan(table[of_level])).tolist()}):
        rows = of_level & (~np.isnan(table) == np.array(defined)).all(axis=1)
        true = table == 1
        classes = _exclusive(true[rows], np.flatnonzero(defined))
        one = rows & (true[:, classes].sum(axis=1) == 1)
        classes = [i for i in classes if len(set(groups[one & true[:, i]])) >= MIN_CLASS]
        if len(classes) > 1:
            sets.append((tuple(columns[i] for i in classes), one & true[:, classes].any(axis=1)))
    return sets


def _exclusive(true: np.ndarray, labels: np.ndarray) -> list[int]:
    """Return the labels that remain if those true together with most others are left out, until one is true in most rows.

    Colors of an object exclude each other, its size does not exclude them: ``big`` is left out.
    """
    chosen = labels.tolist()
    while len(chosen) > 1 and (true[:, chosen].sum(axis=1) == 1).mean() < EXCLUSIVE:
        together = true[:, chosen].T.astype(int) @ true[:, chosen]
        np.fill_diagonal(together, 0)
        chosen.pop(int(together.sum(axis=1).argmax()) if together.any() else int(true[:, chosen].sum(axis=0).argmin()))
    return chosen


def _has_object(store: ActivationStore) -> np.ndarray:
    """Return whether each row has tokens of its object, bool ``[n]``."""
    array = next(
        a for a in store.arrays if str(a.tokens) == "object:mean" and a.stack in {"vision", "projector", "decoder"}
    )
    site = "projector.out" if array.stack == "projector" else f"{array.stack}.L{array.layers[0]}.{array.component}"
    return np.asarray(~np.isnan(store.read(site, "object:mean")).any(axis=1))


def _limited(rows: np.ndarray, frame: pd.DataFrame, limit: int) -> np.ndarray:
    """Return at most `limit` rows of whole groups, which are taken evenly over the table."""
    groups = frame["group"].astype(str).to_numpy()
    names: Sequence[str] = list(dict.fromkeys(groups[rows].tolist()))
    if rows.sum() <= limit:
        return rows
    count = max(1, int(len(names) * limit / rows.sum()))
    chosen = {names[int(i)] for i in np.linspace(0, len(names) - 1, count).round()}
    return rows & np.isin(groups, list(chosen))
