"""ICT, image-object cross-level trusted intervention: push heads that detect visual evidence toward the clean image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from groundscope.core.errors import PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, parse_heads
from mitigation.steering.activations import first_image_layer
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.contrast import Contrast, PairContrast
from mitigation.steering.derive.base import Variant, along, check_variant, require_pairs, unit_difference
from mitigation.steering.derive.head_selection import Fold, best, group_folds, probe_accuracies
from mitigation.steering.places import Key
from mitigation.steering.vector import SteeringVector

SLICE = 32
"""Width of a slice that the release treats as a head: it divides LLaVA-1.5's 4,096 dimensions into 128 slices."""


def ict(
    contrast: Contrast,
    *,
    heads: Iterable[Head | str] = (),
    top: int = 256,
    tokens: str = "last",
    positions: str = "last+generated",
    strength: float = 8.0,
    variant: Variant = "paper",
    slice_width: int = SLICE,
    seed: int = 0,
    progress: bool | None = None,
) -> SteeringVector:
    """Return one level of ICT: ``z <- z + alpha * sigma * theta`` at the K heads that best separate clean and corrupt images.

    Chen et al. 2024 (arXiv 2411.15268): theta = unit(mean of clean - mean of corrupt), sigma the standard deviation of all
    projections, K = 256 heads by the accuracy of a probe in two folds, alpha = beta = 8. With pairs of kind ``blur`` this
    is the image level, with ``mask`` the object level; the full method combines both,
    ``combine([ict(blurred), ict(masked)])``.

    Parameters
    ----------
    contrast
        Pairs of one kind (`Contrast.from_pairs`): ``blur`` or ``mask``.
    heads
        Candidate heads; by default all.
    top
        K; all heads if the model has fewer.
    tokens, positions
        As for `mean_difference`; the method reads and acts at the last token.
    strength
        alpha, or beta for the object level.
    variant
        ``paper``: heads, with both images of a pair in the same fold. ``release`` (github.com/THU-BPM/ICT): acts on the
        attention output, divided into slices that are not heads, and may put the images of a pair into different folds.
    slice_width
        Width of a slice; used only by variant ``release``.
    seed
        Seed of the division of images into folds.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    PatchError
        For a contrast without pairs, pairs of several kinds, fewer than two images, or a slice width that does not divide the
        width of the model.
    SiteError
        For a head that the model lacks.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "blur")
    >>> vector = gs.derive.ict(gs.Contrast.from_pairs(model, pairs[::20]), heads=["L3.H0", "L3.H1", "L4.H0"], top=2)
    >>> len(vector.heads)
    2
    """
    check_variant(variant)
    pair_contrast = require_pairs(contrast, "ict")
    model, pairs = pair_contrast.model, pair_contrast.pairs
    kinds = sorted({p.kind for p in pairs})
    if len(kinds) > 1:
        msg = f"ict takes pairs of one kind, these have {', '.join(kinds)}; call ict once per kind, then combine([…]) the vectors"
        raise PatchError(msg)
    is_clean = np.arange(2 * len(pairs)) < len(pairs)
    changes: dict[Key, VectorChange]
    if variant == "release":
        order = np.random.default_rng(seed).permutation(len(is_clean))
        fold_of_row = np.empty(len(is_clean), int)
        fold_of_row[order] = np.arange(len(is_clean)) * 2 // len(is_clean)
        folds = [(fold_of_row != i, fold_of_row == i) for i in (0, 1)]
        changes = _slices(pair_contrast, tokens, slice_width, top, folds, progress)
    else:
        candidates = parse_heads(heads) or tuple(
            Head(i, k) for i in range(first_image_layer(model), model.n_layers) for k in range(model.n_heads)
        )
        sides = {key: both for key, *both in contrast.read(candidates, tokens, progress=progress)}
        folds = group_folds([p.clean.group for p in pairs] * 2, 2, seed)
        accuracies = probe_accuracies(
            candidates, lambda key: np.concatenate(sides[key]), is_clean, folds, progress=progress
        )
        changes = {key: unit_difference(sides[key][0], sides[key][1], key) for key in best(accuracies, top)}
    method = f"ICT ({variant}), {kinds[0]}"
    return contrast.build(changes, method, tokens=tokens, positions=positions, strength=strength)


def _slices(
    contrast: PairContrast, tokens: str, width: int, top: int, folds: Sequence[Fold], progress: bool | None
) -> dict[Key, VectorChange]:
    """Return for each layer the sum of the release's additions to the slices of its attention output."""
    model: Lvlm = contrast.model
    if width < 1 or model.width % width:
        msg = f"slice_width={width}: it must divide the width {model.width} of {model.name}"
        raise PatchError(msg)
    sites: tuple[Key, ...] = tuple(replace(model.head_site(i), component="attn_out") for i in range(model.n_layers))
    outputs = {key: both for key, *both in contrast.read(sites, tokens, progress=progress)}
    # A slice is named by the head that the release takes it for.
    columns_of = {
        Head(i, k): slice(k * width, (k + 1) * width)
        for i in range(first_image_layer(model), model.n_layers)
        for k in range(model.width // width)
    }
    parts: dict[Key, list[np.ndarray]] = {
        h: [x[:, columns] for x in outputs[sites[h.layer]]] for h, columns in columns_of.items()
    }
    is_clean = np.arange(2 * len(contrast.pairs)) < len(contrast.pairs)
    accuracies = probe_accuracies(
        list(parts), lambda key: np.concatenate(parts[key]), is_clean, folds, progress=progress
    )
    sums: dict[Key, np.ndarray] = {}
    for key in best(accuracies, top):
        if not isinstance(key, Head):
            continue
        clean, corrupt = parts[key]
        change = along(clean.mean(axis=0) - corrupt.mean(axis=0), np.concatenate([clean, corrupt]), key)
        total = sums.setdefault(sites[key.layer], np.zeros(model.width))
        total[columns_of[key]] += change.sigma * change.direction
    return {
        site: AddChange(total / np.linalg.norm(total), float(np.linalg.norm(total))) for site, total in sums.items()
    }
