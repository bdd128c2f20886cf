"""Inference-time intervention: the heads that know best, pushed along the difference of means."""

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
    """What is needed of an `ActivationStore` with all heads of a decoder."""

    def layers(self, stack: str, component: str) -> int:
        """Return how many layers were traced."""
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
    """Return ITI's vector: ``z <- z + alpha * sigma * theta`` at the K heads whose probes know best.

    Li et al. 2023 (arXiv 2306.03341): a logistic probe on each head, K = 48 heads of highest validation accuracy, theta the
    unit difference of class means ("mass mean"), sigma the standard deviation of projections on theta, alpha = 15.

    Parameters
    ----------
    store, concept, positive, negative, tokens, positions
        As for `mean_difference`; the store holds ``z`` of the heads and a column ``group``.
    heads
        To choose among; by default all that were traced.
    top
        K.
    accuracy
        Validation accuracy by head where probes were fitted already (`probes.fit_grid` does that much faster); the others
        are fitted with scikit-learn on one part of the images and scored on the rest.
    folds
        One part in so many is for validation: 5 as in the paper's 4 to 1.
    strength
        alpha.
    seed
        Of the division of images.
    variant
        ``paper``: theta and sigma of the training images. ``release`` (github.com/likenneth/honest_llama): both of all
        images, validation included. (Its weight editing also stores the vector as a bias without projecting it, which is
        another function; `mitigation.steering.export.baked` projects.)

    Raises
    ------
    PatchError
        Where a side has no examples, there are too few images, or `top` is below 1.
    SiteError
        Where the store lacks ``z`` or the concept.
    """
    check_variant(variant)
    right, wrong = two_sides(store, concept, positive, negative)
    candidates = parse_heads(heads) or tuple(
        Head(i, k)
        for i in traced_heads(store) or range(store.layers("decoder", "z"))
        for k in range(store.n_heads("decoder"))
    )
    used = np.flatnonzero((right | wrong) & ~np.isnan(read(store, candidates[0], tokens)).any(axis=1))
    truth = right[used]
    train, held = group_folds(store.frame()["group"].to_numpy()[used].tolist(), folds, seed)[0]
    known: dict[Key, float]
    if accuracy is None:
        known = probe_accuracies(candidates, lambda key: read(store, key, tokens)[used], truth, [(train, held)])
    else:
        by_head = {head: value for name, value in accuracy.items() for head in parse_heads(name)}
        missing = [h for h in candidates if h not in by_head]
        if missing:
            msg = f"no accuracy given for {', '.join(map(str, missing[:5]))}: give it for all heads, or name those in heads="
            raise PatchError(msg)
        known = {h: float(by_head[h]) for h in candidates}
    chosen = best(known, top)
    seen = train if variant == "paper" else np.ones(len(used), bool)
    entries: dict[Key, Entry] = {}
    for key in chosen:
        x = read(store, key, tokens)[used]
        entries[key] = along(mean(x[seen & truth], key) - mean(x[seen & ~truth], key), x[seen], key)
    about = {
        "method": f"ITI ({variant})",
        "concept": None if concept is None else str(concept),
        "positive": int(truth.sum()),
        "negative": int((~truth).sum()),
        "tokens": tokens,
        "top": top,
        "seed": seed,
        "accuracy": {str(key): known[key] for key in chosen},
    }
    return made_from_store(store, entries, "add", positions, strength, about)
