"""ICT, image-object cross-level trusted intervention: push heads that detect visual evidence toward the clean image."""

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
"""Width of a slice that the release treats as a head: it divides LLaVA-1.5's 4,096 dimensions into 128 slices."""


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
    """Return one level of ICT: ``z <- z + alpha * sigma * theta`` at the K heads that best separate clean and corrupt images.

    Chen et al. 2024 (arXiv 2411.15268): theta = unit(mean of clean - mean of corrupt), sigma the standard deviation of all
    projections, K = 256 heads by the accuracy of a probe in two folds, alpha = beta = 8. With pairs of kind ``blur`` this
    is the image level, with ``mask`` the object level; the full method combines both,
    ``combined([ict(model, blurred), ict(model, masked)])``.

    Parameters
    ----------
    model
        The model to steer.
    pairs
        Pairs of one kind: ``blur`` or ``mask``.
    heads
        Candidate heads; by default all.
    top
        K; all heads if the model has fewer.
    positions, tokens
        As for `from_pairs`; the method reads and acts at the last token.
    strength
        alpha, or beta for the object level.
    seed
        Seed of the division of images into folds.
    variant
        ``paper``: heads, with both images of a pair in the same fold. ``release`` (github.com/THU-BPM/ICT): acts on the
        attention output, divided into slices that are not heads, and may put the images of a pair into different folds.
    slice_width
        Width of a slice; used only by variant ``release``.

    Raises
    ------
    PatchError
        For no pairs, pairs of several kinds, fewer than two images, or a slice width that does not divide the model's
        width.
    SiteError
        For a head that the model lacks.
    """
    check_variant(variant)
    clean, corrupt = sides(pairs)
    kinds = sorted({p.kind for p in pairs})
    if len(kinds) > 1:
        msg = f"pairs of several kinds ({', '.join(kinds)}); derive each level from one kind, and combine the vectors"
        raise PatchError(msg)
    is_clean = np.arange(2 * len(pairs)) < len(pairs)
    method_and_tokens = (f"ICT ({variant}), {kinds[0]}", tokens)
    if variant == "release":
        order = np.random.default_rng(seed).permutation(len(is_clean))
        fold_of_row = np.empty(len(is_clean), int)
        fold_of_row[order] = np.arange(len(is_clean)) * 2 // len(is_clean)
        entries = _slices(
            model, (clean, corrupt, tokens), slice_width, top, [(fold_of_row != i, fold_of_row == i) for i in (0, 1)]
        )
        return made_from_pairs(model, pairs, entries, "add", positions, strength, method_and_tokens)
    first = first_image_layer(model)
    candidates = parse_heads(heads) or tuple(
        Head(i, k) for i in range(first, model.n_layers) for k in range(model.n_heads)
    )
    check_image_reaches(model, pairs, candidates)
    clean_x, corrupt_x = (activations(model, side, candidates, tokens) for side in (clean, corrupt))
    folds = group_folds([p.clean.group for p in pairs] * 2, 2, seed)
    accuracies = probe_accuracies(
        candidates, lambda key: np.concatenate([clean_x[key], corrupt_x[key]]), is_clean, folds
    )
    entries = {key: unit_difference(clean_x[key], corrupt_x[key], key) for key in best(accuracies, top)}
    return made_from_pairs(model, pairs, entries, "add", positions, strength, method_and_tokens)


def _slices(
    model: Lvlm,
    examples_and_tokens: tuple[Sequence, Sequence, str],
    width: int,
    top: int,
    folds: list[tuple[np.ndarray, np.ndarray]],
) -> dict[Key, Entry]:
    """Return for each layer the sum of the release's additions to the slices of its attention output."""
    if width < 1 or model.width % width:
        msg = f"slice_width={width}: it must divide the width {model.width} of {model.name}"
        raise PatchError(msg)
    sites: tuple[Key, ...] = tuple(replace(model.head_site(i), component="attn_out") for i in range(model.n_layers))
    clean, corrupt, tokens = examples_and_tokens
    clean_x, corrupt_x = (activations(model, side, sites, tokens) for side in (clean, corrupt))
    # A slice is named by the head that the release takes it for.
    columns_of = {
        Head(i, k): slice(k * width, (k + 1) * width)
        for i in range(first_image_layer(model), model.n_layers)
        for k in range(model.width // width)
    }
    parts: dict[Key, tuple[np.ndarray, np.ndarray]] = {
        h: (clean_x[sites[h.layer]][:, columns], corrupt_x[sites[h.layer]][:, columns])
        for h, columns in columns_of.items()
    }
    is_clean = np.arange(2 * len(clean)) < len(clean)
    accuracies = probe_accuracies(list(parts), lambda key: np.concatenate(parts[key]), is_clean, folds)
    moves: dict[Key, np.ndarray] = {}
    for key in best(accuracies, top):
        if not isinstance(key, Head):
            continue
        x, y = parts[key]
        entry = along(x.mean(axis=0) - y.mean(axis=0), np.concatenate([x, y]), key)
        move = moves.setdefault(sites[key.layer], np.zeros(model.width))
        move[columns_of[key]] += entry.sigma * entry.vector
    return {site: Entry(move / np.linalg.norm(move), float(np.linalg.norm(move))) for site, move in moves.items()}
