"""Why answers are wrong: probes for every kind of question, and a diagnosis of the wrong answers of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.schema import LEVELS
from probes import fit_grid, probeable

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationStore, ArrayInfo, Direction

FOLDS, TEST, PENALTIES = 3, 0.3, (0.001, 0.01, 0.1)


class _Subjects:
    """A store in which a noun's label says whether it is the object the question is about, where that is in the image."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store

    @property
    def arrays(self) -> Sequence[ArrayInfo]:
        return self._store.arrays

    @property
    def digest(self) -> str:
        return self._store.digest

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._store.provenance

    def frame(self) -> pd.DataFrame:
        frame = self._store.frame()
        nouns = [c for c in frame if str(c).startswith("object:") and c != "object:named"]
        subject = frame["subject"].astype(str)
        there = {c: np.where(subject == "", np.nan, subject == str(c).partition(":")[2]) for c in nouns}
        return frame.assign(**there)

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        return self._store.read(site, tokens, head=head, examples=examples)


def fit_directions(store: ActivationStore, rows: np.ndarray, *, seed: int = 0) -> list[Direction]:
    """Fit what `circuits.diagnose` reads with, on some rows of a store.

    Attributes at the object's tokens; nouns there too, to be read at each of the image's tokens; at the last token, for each
    kind of question, whether what it asks is true, or which of its answers is. Concepts with too few images are left out.

    Parameters
    ----------
    store
        With ``resid_post`` and ``projector.out`` at ``object:mean`` and ``resid_post`` at ``last``.
    rows
        bool ``[n]``: which examples probes may learn from, the held-out ones that calibrate them included. Examples whose
        images are among the training part of these get no verdict.
    seed
        Of the split.
    """
    frame = store.frame()
    attributes = [c for c in store.labels if c.startswith("attribute:") and c != "attribute:named"]
    found: list[Direction] = []
    for stack, component in (("vision", "resid_post"), ("projector", "out"), ("decoder", "resid_post")):
        if store.has(stack, component, "object:mean"):
            found += _fitted(store, attributes, component, "object:mean", stack, rows, seed)
            found += [replace(d, tokens="image:all") for d in _nouns(store, component, stack, rows, seed)]
    if store.has("decoder", "resid_post", "last"):
        kinds: Any = frame["level"].astype(str) + " " + frame["kind"].astype(str)
        for kind in dict.fromkeys(kinds[rows]):
            mine = rows & (kinds == kind).to_numpy()
            answers = set(frame["answer"][mine])
            level = kind.partition(" ")[0]
            asked = [f"{level}:named"] if answers & {"yes", "no"} else [f"{level}:{a}" for a in sorted(answers)]
            wanted = [c for c in asked if c in frame and level in LEVELS]
            found += _fitted(store, wanted, "resid_post", "last", "decoder", mine, seed, kind)
    return found


def _nouns(store: ActivationStore, component: str, stack: str, rows: np.ndarray, seed: int) -> Iterator[Direction]:
    """Yield directions for which noun an object is, from one question about each object."""
    frame = store.frame()
    first = ~frame.duplicated(["group", "subject"]).to_numpy() & (frame["subject"] != "").to_numpy() & rows
    view: Any = _Subjects(store)
    nouns = [str(c) for c in frame if str(c).startswith("object:") and c != "object:named"]
    yield from _fitted(view, nouns, component, "object:mean", stack, first, seed)


def _fitted(
    store: ActivationStore,
    concepts: Sequence[str],
    component: str,
    tokens: str,
    stack: str,
    rows: np.ndarray,
    seed: int,
    kind: str = "",
) -> Iterator[Direction]:
    possible = set(probeable(store, folds=FOLDS, test_fraction=TEST, rows=rows)) if rows.any() else set()
    wanted = [c for c in concepts if c in possible]
    if not wanted:
        return
    grid = fit_grid(
        store, wanted, component, tokens, stack, penalties=PENALTIES, folds=FOLDS, test_fraction=TEST, seed=seed,
        control=0, rows=rows, resamples=1, progress=False, heads=False,
    )  # fmt: skip
    for concept in wanted:
        for layer in grid.layers:
            if grid.weights[grid.concepts.index(concept), grid.layers.index(layer), 0].any():
                yield replace(grid.direction(concept, layer), kind=kind)
