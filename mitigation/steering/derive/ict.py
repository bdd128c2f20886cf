"""Image-object cross-level trusted intervention: heads that see whether there is something to see, pushed to seeing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from concepts.schema import CounterfactualPair
from groundscope.core.errors import PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, parse_heads
from mitigation.steering.derive.base import (
    Variant,
    activations,
    along,
    check_image_reaches,
    check_variant,
    first_image_layer,
    made_from_pairs,
    sides,
    unit_difference,
)
from mitigation.steering.derive.head_selection import best, group_folds, probe_accuracies
from mitigation.steering.placement import Entry, Key
from mitigation.steering.vector import Positions, SteeringVector

SLICE = 32
"""Width of what the release calls a head: it cuts the 4,096 of LLaVA-1.5 into 128."""


def ict(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    heads: Iterable[Head | str] = (),
    top: int = 256,
    positions: Positions = "last",
    tokens: str = "last",
    strength: float = 8.0,
    seed: int = 0,
    variant: Variant = "paper",
    slice_width: int = SLICE,
) -> SteeringVector:
    """Return one level of ICT: ``z <- z + alpha * sigma * theta`` at the K heads that tell clean from destroyed images.

    Chen et al. 2024 (arXiv 2411.15268): theta = unit(mean of clean - mean of corrupt), sigma the standard deviation of all
    projections, K = 256 heads by the accuracy of a probe in two folds, alpha = beta = 8. With pairs of kind ``blur`` this
    is the image level, with ``mask`` the object level; the method is both at once,
    ``combined([ict(model, blurred), ict(model, masked)])``.

    Parameters
    ----------
    model
        The model to steer.
    pairs
        Of one kind: ``blur`` or ``mask``.
    heads
        To choose among; by default all.
    top
        K; all where the model has fewer.
    positions, tokens
        As for `from_pairs`; the method reads and acts at the last token.
    strength
        alpha, or beta for the object level.
    seed
        Of the division of images into folds.
    variant
        ``paper``: real heads, and a clean image in the same fold as its twin. ``release`` (github.com/THU-BPM/ICT): acts on
        the attention's output instead, whose width it cuts into slices that are not heads, and lets twins straddle folds.
    slice_width
        ``release`` only: width of a slice.

    Raises
    ------
    PatchError
        For no pairs, pairs of several kinds, fewer than two images, or a slice width that does not divide the model's.
    SiteError
        For a head that the model lacks.
    """
    check_variant(variant)
    clean, corrupt = sides(pairs)
    kinds = sorted({p.kind for p in pairs})
    if len(kinds) > 1:
        msg = f"pairs of kinds {', '.join(kinds)}: derive each level from one kind, and combine the vectors"
        raise PatchError(msg)
    truth = np.arange(2 * len(pairs)) < len(pairs)
    how = (f"ICT ({variant}), {kinds[0]}", tokens)
    if variant == "release":
        order = np.random.default_rng(seed).permutation(len(truth))
        part = np.empty(len(truth), int)
        part[order] = np.arange(len(truth)) * 2 // len(truth)
        entries = _slices(model, (clean, corrupt, tokens), slice_width, top, [(part != i, part == i) for i in (0, 1)])
        return made_from_pairs(model, pairs, entries, "add", positions, strength, how)
    first = first_image_layer(model)
    candidates = parse_heads(heads) or tuple(
        Head(i, k) for i in range(first, model.n_layers) for k in range(model.n_heads)
    )
    check_image_reaches(model, pairs, candidates)
    seen, unseen = (activations(model, side, candidates, tokens) for side in (clean, corrupt))
    folds = group_folds([p.clean.group for p in pairs] * 2, 2, seed)
    known = probe_accuracies(candidates, lambda key: np.concatenate([seen[key], unseen[key]]), truth, folds)
    entries = {key: unit_difference(seen[key], unseen[key], key) for key in best(known, top)}
    return made_from_pairs(model, pairs, entries, "add", positions, strength, how)


def _slices(
    model: Lvlm, given: tuple[Sequence, Sequence, str], width: int, top: int, folds: list[tuple[np.ndarray, np.ndarray]]
) -> dict[Key, Entry]:
    """Return for each layer the sum of what the release adds to the slices of its attention output."""
    if width < 1 or model.width % width:
        msg = f"slice_width={width} does not divide the width {model.width} of {model.name}"
        raise PatchError(msg)
    sites: tuple[Key, ...] = tuple(replace(model.head_site(i), component="attn_out") for i in range(model.n_layers))
    clean, corrupt, tokens = given
    seen, unseen = (activations(model, side, sites, tokens) for side in (clean, corrupt))
    # A slice goes by the name of the head it is taken for.
    taken = {
        Head(i, k): slice(k * width, (k + 1) * width)
        for i in range(first_image_layer(model), model.n_layers)
        for k in range(model.width // width)
    }
    parts: dict[Key, tuple[np.ndarray, np.ndarray]] = {
        h: (seen[sites[h.layer]][:, columns], unseen[sites[h.layer]][:, columns]) for h, columns in taken.items()
    }
    truth = np.arange(2 * len(clean)) < len(clean)
    known = probe_accuracies(list(parts), lambda key: np.concatenate(parts[key]), truth, folds)
    moves: dict[Key, np.ndarray] = {}
    for key in best(known, top):
        if not isinstance(key, Head):
            continue
        one, two = parts[key]
        entry = along(one.mean(axis=0) - two.mean(axis=0), np.concatenate([one, two]), key)
        move = moves.setdefault(sites[key.layer], np.zeros(model.width))
        move[taken[key]] += entry.sigma * entry.vector
    return {site: Entry(move / np.linalg.norm(move), float(np.linalg.norm(move))) for site, move in moves.items()}
