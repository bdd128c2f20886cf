"""ITI, inference-time intervention: push the heads with the most accurate probes along the difference of means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from groundscope.core.errors import PatchError
from lvlm.sites import Head, parse_heads
from mitigation.steering.derive.base import (
    Store,
    Variant,
    along,
    check_variant,
    made_from_store,
    mean,
    read,
    traced_heads,
    two_sides,
)
from mitigation.steering.derive.head_selection import best, group_folds, probe_accuracies
from mitigation.steering.placement import Entry, Key
from mitigation.steering.vector import Positions, SteeringVector

if TYPE_CHECKING:
    from concepts.schema import Concept


class HeadStore(Store, Protocol):
    """The part of `ActivationStore` that ITI uses; the store contains all heads of a decoder."""

    def layers(self, stack: str, component: str) -> int:
        """Return the number of traced layers."""
        ...

    def n_heads(self, stack: str) -> int:
        """Return the number of heads of a layer."""
        ...


def iti(
    store: HeadStore,
    concept: Concept | str | None = None,
    *,
    positive: np.ndarray | None = None,
    negative: np.ndarray | None = None,
    heads: Iterable[Head | str] = (),
    top: int = 48,
    accuracy: Mapping[Head, float] | Mapping[str, float] | None = None,
    folds: int = 5,
    tokens: str = "last",
    positions: Positions = "last",
    strength: float = 15.0,
    seed: int = 0,
    variant: Variant = "paper",
) -> SteeringVector:
    """Return ITI's vector: ``z <- z + alpha * sigma * theta`` at the K heads with the most accurate probes.

    Li et al. 2023 (arXiv 2306.03341): a logistic probe on each head, K = 48 heads of highest validation accuracy, theta the
    unit difference of class means ("mass mean"), sigma the standard deviation of projections on theta, alpha = 15.

    Parameters
    ----------
    store, concept, positive, negative, tokens, positions
        As for `mean_difference`; the store contains ``z`` of the heads and a column ``group``.
    heads
        Candidate heads; by default all traced heads.
    top
        K.
    accuracy
        Validation accuracy of every candidate head, if probes are already fitted (`probes.fit_grid` is much faster). By
        default probes are fitted here with scikit-learn on the training images and scored on the validation images.
    folds
        One of so many parts is used for validation: 5 gives the paper's ratio of 4 to 1.
    strength
        alpha.
    seed
        Seed of the division of images.
    variant
        ``paper``: theta and sigma from the training images. ``release`` (github.com/likenneth/honest_llama): both from
        all images, validation included. (Its weight editing also stores the vector as a bias without applying the output
        projection, which is a different function; `mitigation.steering.export.baked` applies it.)

    Raises
    ------
    PatchError
        If a side has no examples, there are too few images, or `top` is below 1.
    SiteError
        If the store lacks ``z`` or the concept.
    """
    check_variant(variant)
    positive_mask, negative_mask = two_sides(store, concept, positive, negative)
    candidates = parse_heads(heads) or tuple(
        Head(i, k)
        for i in traced_heads(store) or range(store.layers("decoder", "z"))
        for k in range(store.n_heads("decoder"))
    )
    rows = np.flatnonzero((positive_mask | negative_mask) & ~np.isnan(read(store, candidates[0], tokens)).any(axis=1))
    truth = positive_mask[rows]
    train, validation = group_folds(store.frame()["group"].to_numpy()[rows].tolist(), folds, seed)[0]
    accuracies: dict[Key, float]
    if accuracy is None:
        accuracies = probe_accuracies(
            candidates, lambda key: read(store, key, tokens)[rows], truth, [(train, validation)]
        )
    else:
        by_head = {head: value for name, value in accuracy.items() for head in parse_heads(name)}
        missing = [h for h in candidates if h not in by_head]
        if missing:
            msg = f"no accuracy for {', '.join(map(str, missing[:5]))}; give it for all heads, or pass the others as heads="
            raise PatchError(msg)
        accuracies = {h: float(by_head[h]) for h in candidates}
    chosen = best(accuracies, top)
    fitted = train if variant == "paper" else np.ones(len(rows), bool)
    entries: dict[Key, Entry] = {}
    for key in chosen:
        x = read(store, key, tokens)[rows]
        entries[key] = along(mean(x[fitted & truth], key) - mean(x[fitted & ~truth], key), x[fitted], key)
    provenance = {
        "method": f"ITI ({variant})",
        "concept": None if concept is None else str(concept),
        "positive": int(truth.sum()),
        "negative": int((~truth).sum()),
        "tokens": tokens,
        "top": top,
        "seed": seed,
        "accuracy": {str(key): accuracies[key] for key in chosen},
    }
    return made_from_store(store, entries, "add", positions, strength, provenance)
