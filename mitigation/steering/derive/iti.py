"""ITI, inference-time intervention: push the heads with the most accurate probes along the difference of means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import PatchError, SiteError
from lvlm.sites import Head, parse_heads
from mitigation.steering.activations import mean, read, traced_heads
from mitigation.steering.changes import VectorChange
from mitigation.steering.contrast import Contrast
from mitigation.steering.derive.base import Variant, along, check_variant, require_store
from mitigation.steering.derive.head_selection import best, group_folds, probe_accuracies
from mitigation.steering.places import Key
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from activation_store import ActivationSource


def iti(
    contrast: Contrast,
    *,
    heads: Iterable[Head | str] = (),
    top: int = 48,
    accuracy: Mapping[Head, float] | Mapping[str, float] | None = None,
    folds: int = 5,
    tokens: str = "last",
    positions: str = "last+generated",
    strength: float = 15.0,
    variant: Variant = "paper",
    seed: int = 0,
    progress: bool | None = None,
) -> SteeringVector:
    """Return ITI's vector: ``z <- z + alpha * sigma * theta`` at the K heads with the most accurate probes.

    Li et al. 2023 (arXiv 2306.03341): a logistic probe on each head, K = 48 heads of highest validation accuracy, theta the
    unit difference of class means ("mass mean"), sigma the standard deviation of projections on theta, alpha = 15.

    Parameters
    ----------
    contrast
        Examples of a store (`Contrast.from_store`) with ``z`` of the heads and a column ``group``.
    heads
        Candidate heads; by default all traced heads.
    top
        K.
    accuracy
        Validation accuracy of every candidate head, if probes are already fitted (`probes.fit_grid` is much faster). By
        default probes are fitted here with scikit-learn on the training images and scored on the validation images.
    folds
        One of so many parts is used for validation: 5 gives the paper's ratio of 4 to 1.
    tokens, positions
        As for `mean_difference`.
    strength
        alpha.
    variant
        ``paper``: theta and sigma from the training images. ``release`` (github.com/likenneth/honest_llama): both from
        all images, validation included. (Its weight editing also stores the vector as a bias without applying the output
        projection, which is a different function; `mitigation.export.baked` applies it.)
    seed
        Seed of the division of images.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    PatchError
        For a contrast of pairs, a side without examples, too few images, or a `top` below 1.
    SiteError
        If the store lacks ``z``.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from mitigation import Contrast, derive
    >>> label = np.arange(40) % 2
    >>> class Memory:
    ...     digest, provenance = "0" * 64, {"model": {"name": "m", "config": "c"}}
    ...     def frame(self):
    ...         return pd.DataFrame({"id": map(str, range(40)), "group": map(str, range(40)), "object:cat": label * 1.0})
    ...     def read(self, site, tokens, head=None, examples=None):
    ...         noise = np.random.default_rng(head).standard_normal((40, 4))
    ...         return (noise + 8 * label[:, None] * (head == 1)).astype(np.float32)  # only head 1 encodes the concept
    >>> vector = derive.iti(Contrast.from_store(Memory(), "object:cat"), heads=["L2.H0", "L2.H1"], top=1)
    >>> vector.heads
    (Head(layer=2, head=1),)
    """
    check_variant(variant)
    groups = require_store(contrast, "iti")
    store = groups.store
    candidates = parse_heads(heads) or _all_heads(store)
    defined = ~np.isnan(read(store, candidates[0], tokens)).any(axis=1)
    rows = np.flatnonzero((groups.positive | groups.negative) & defined)
    truth = groups.positive[rows]
    train, validation = group_folds(store.frame()["group"].to_numpy()[rows].tolist(), folds, seed)[0]
    accuracies: dict[Key, float]
    if accuracy is None:
        accuracies = probe_accuracies(
            candidates, lambda key: read(store, key, tokens)[rows], truth, [(train, validation)], progress=progress
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
    changes: dict[Key, VectorChange] = {}
    for key in chosen:
        x = read(store, key, tokens)[rows]
        changes[key] = along(mean(x[fitted & truth], key) - mean(x[fitted & ~truth], key), x[fitted], key)
    return contrast.build(
        changes,
        f"ITI ({variant})",
        tokens=tokens,
        positions=positions,
        strength=strength,
        positive=int(truth.sum()),
        negative=int((~truth).sum()),
        top=top,
        seed=seed,
        accuracy={str(key): accuracies[key] for key in chosen},
    )


def _all_heads(store: ActivationSource) -> tuple[Head, ...]:
    """Return all traced heads of the decoder; raises `SiteError` if a store has none."""
    sites = traced_heads(store)
    arrays = [a for a in getattr(store, "arrays", ()) if a.stack == "decoder" and a.component in ("z", "cross.z")]
    numbers = next((a.head_numbers for a in arrays if a.n_heads), ())
    if not sites or not numbers:
        msg = "the store has no heads of the decoder; trace sites=['z'], or pass heads="
        raise SiteError(msg)
    return tuple(Head(layer, k) for layer in sites for k in numbers)
