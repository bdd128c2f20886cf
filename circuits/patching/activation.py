"""Exact activation patching: the effect of each head, layer or position on the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from circuits.execution.memory import MEMORY
from circuits.patching.metrics import Metric, MetricFunction, metric_of
from circuits.patching.pairs import (
    MODES,
    UnequalLengthError,
    check_enough_pairs,
    check_evaluating,
    check_pair,
    combined_error,
    pairs_digest,
    plan_pair,
)
from circuits.patching.sweep import Mode, PairPlan, Settings, SweepResult, patches, sweep
from circuits.patching.targets import Target, every_head, units_of
from circuits.results.head_scores import HeadScores
from circuits.results.patch_scores import PatchScores
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.progress import progress_bar
from groundscope.core.text import format_count
from lvlm.model import Lvlm
from lvlm.token_selection import PATCHABLE, TokenSelection

__all__ = ["Mode", "check_evaluating", "check_pair", "pairs_digest", "patch", "patch_heads"]

TOKENS = ("last", "suffix:all")


def patch_heads(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    tokens: str = "last",
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    min_effect: float | None = None,
    scale: float | None = None,
    batch_size: int | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> HeadScores:
    """Patch each attention head of the decoder separately, for each pair, and measure the effect on the answer.

    With M the metric, by default the log-odds of the clean image's answer against the corrupt image's answer, and
    ``PE = (M_patched - M_corrupt) / (M_clean - M_corrupt)``, the effect of a head is

    - ``denoise``: patch the head's clean output into the corrupt run; effect = PE: the share of the difference that
      this head restores;
    - ``noise``: patch the head's corrupt output into the clean run; effect = 1 - PE: the share of the difference that
      is lost.

    In both modes 0 means that the head carries none of the changed information (Wang et al. 2023, arXiv 2211.00593;
    Zhang & Nanda 2024, arXiv 2309.16042). Every effect is an actual run of the model, not an approximation. All heads
    together cost a few forward passes, because the prefix before the patched tokens is computed once and shared; for a
    model that does not support this, each patch is a full forward pass, and the logger
    ``circuits.execution.patch_runner`` emits a WARNING.

    Parameters
    ----------
    model
        In evaluation mode.
    pairs
        Pairs of equal token length whose true answers differ, or placebo pairs, whose true answers are equal.
    tokens
        Positions to patch: ``last``, the last prompt token; ``suffix:all``, all tokens after the image jointly.
    mode
        ``denoise`` or ``noise``.
    metric
        Name in `circuits.metrics` (``logit_difference``, ``probability``, ``log_probability``, ``kl``), or a function from
        logits ``[B, V]`` at the last prompt token and the pair to one number per run, ``[B]``; called once per pair.
    min_effect
        Pairs with ``|M_clean - M_corrupt|`` below this are excluded and counted in `HeadScores.excluded`, because
        dividing by a tiny difference gives noise. By default 0.5 for ``logit_difference`` and ``log_probability``, 0.05 for
        ``probability`` and ``kl``, 0 for functions. With 0, pairs with identical images are included, and all their
        effects are exactly 0. With a `scale`, and for placebo pairs, the default is 0.
    scale
        Divisor of the change of the metric, the same for all pairs; by default the difference ``M_clean - M_corrupt`` of each
        pair. For placebo pairs, whose own differences are near 0, the default is 1: their effects are in units of the metric.
        To compare them with the pairs that they control, pass `HeadScores.scale` of those pairs. The metric of a placebo pair
        compares the true answer with the answer by prior, or the first wrong candidate.
    batch_size
        Largest number of patches per batch; None for as many as memory allows.
    memory
        Largest number of bytes for the patches of one batch, in addition to the model and the recorded runs; does not
        affect results.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Returns
    -------
    HeadScores
        Effects ``[n_pairs, n_layers, n_heads]`` of the pairs used, in their order. In layers with cross-attention only
        (Llama-3.2-Vision), heads are those of the cross-attention.

    Raises
    ------
    PatchError
        Before any forward pass: if `pairs` is empty; if the examples of a pair differ in length or in the positions of the
        image; if the answers of a pair begin with the same token, or are equal (except in placebo pairs); if placebo pairs
        and other pairs are mixed without a `scale`; if the model is in training mode; or if `memory` is too small for one
        patch. After the forward passes: if more than half of the pairs are below `min_effect`.
    ModelError
        If the metric of a pair, patched or not, is not finite.
    SiteError
        If `tokens` is unknown or ambiguous.
    ConfigError
        If an option has an unknown value.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> scores = gs.patch_heads(model, pairs)
    >>> scores.shape, scores.top(2)
    ((6, 8), (Head(layer=4, head=7), Head(layer=5, head=3)))

    Any function of the logits at the last prompt token is a metric:

    >>> spread = gs.patch_heads(model, pairs, metric=lambda logits, pair: logits.amax(-1) - logits.mean(-1))
    >>> spread.effects.shape
    (2, 6, 8)
    """
    tokens = str(TokenSelection.parse(tokens, allowed=TOKENS))
    scale = scale_of(pairs, scale)
    settings = settings_of(model, mode, metric_of(metric), memory, batch_size, min_effect, progress, scale)
    plans = plans_of(model, pairs, tokens, settings)
    result = sweep(model, plans, patches(model, every_head(model)), settings)
    effects = result.effects.reshape(len(plans), model.n_layers, model.n_heads)
    about = {"path": "shared prefix" if result.shared else "whole forwards"}
    return head_scores_of(
        model, plans, effects, np.stack([result.clean, result.corrupt]), result.used, tokens, settings, about
    )


def head_scores_of(
    model: Lvlm,
    plans: Sequence[PairPlan],
    effects: np.ndarray,
    baseline: np.ndarray,
    used: np.ndarray,
    tokens: str,
    settings: Settings,
    provenance: Mapping[str, Any],
) -> HeadScores:
    """Return the scores of the usable pairs from the effects of all pairs ``[n_pairs, n_layers, n_heads]``.

    `baseline` is the metric of the clean and of the corrupt runs, ``[2, n_pairs]``. Raises `PatchError` if more than half
    of the pairs are excluded.
    """
    check_enough_pairs(baseline[0], baseline[1], used, settings.min_effect)
    return HeadScores(
        effects[used],
        baseline[0, used],
        baseline[1, used],
        **record_of(model, plans, used, tokens, settings),
        provenance={**_provenance(settings), **provenance},
    )


def _provenance(settings: Settings) -> dict[str, Any]:
    return {**settings.metric.provenance, **({} if settings.scale is None else {"scale": settings.scale})}


def record_of(
    model: Lvlm, plans: Sequence[PairPlan], used: np.ndarray, tokens: str, settings: Settings
) -> dict[str, Any]:
    """Return the fields of a `PairRecord`: those of the pairs used, and the settings."""
    pairs = [plan.pair for plan, keep in zip(plans, used, strict=True) if keep]
    return {
        "ids": tuple(p.clean.id for p in pairs),
        "groups": tuple(p.group for p in pairs),
        "levels": tuple(p.clean.level or "" for p in pairs),
        "kinds": tuple(p.kind for p in pairs),
        "tokens": tokens,
        "mode": settings.mode,
        "metric": settings.metric.name,
        "min_effect": settings.min_effect,
        "excluded": int((~used).sum()),
        "model": model.name,
        "config_hash": model.config_hash,
        "weights_hash": model.weights_hash,
        "pairs_digest": pairs_digest([plan.pair for plan in plans]),
    }


def patch(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    sites: Target | Sequence[Target] = "z",
    *,
    tokens: str = "last",
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    min_effect: float | None = None,
    scale: float | None = None,
    batch_size: int | None = None,
    memory: int = MEMORY,
    progress: bool | None = None,
) -> PatchScores:
    """Measure the effect of patching each site of the decoder separately, for each pair; `patch_heads` defines the effect.

    Parameters
    ----------
    model
        In evaluation mode.
    pairs
        Pairs of equal token length whose true answers differ, or placebo pairs.
    sites
        One or several of: a component of every layer (``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``,
        ``mlp_out``; ``z`` for each head separately), a `Site`, a `Head`, or a `HeadSet` of heads to patch together, in one run.
    tokens
        ``last``; ``suffix:all`` (every token after the image), ``question:all``, ``image:all``, ``object:all`` or ``all``,
        patched jointly, or each token separately, as in ``suffix:each``; or ``positions:12,13``, counted from 0. A
        patch recomputes the positions from its first one on, in the layers from its own on: early positions cost more.
    mode, metric, min_effect, scale, batch_size, memory, progress
        As in `patch_heads`.

    Returns
    -------
    PatchScores
        Effects ``[n_pairs, n_sites, n_positions]`` of the pairs used, in their order.

    Raises
    ------
    PatchError
        As `patch_heads`, and if a pair lacks the tokens.
    ModelError
        If the metric of a pair, patched or not, is not finite.
    SiteError
        If the model has no such site or head, the site has no positions, or `tokens` is unknown or ambiguous.
    ConfigError
        If an option has an unknown value.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> sites = ["decoder.L5.mlp_out", "L4.H7", gs.HeadSet(["L4.H7", "L5.H3"])]
    >>> scores = gs.patch(model, pairs, sites, tokens="last")
    >>> scores.sites, scores.mean.shape
    (('decoder.L5.mlp_out', 'L4.H7', 'L4.H7+L5.H3'), (3, 1))
    """
    scale = scale_of(pairs, scale)
    settings = settings_of(model, mode, metric_of(metric), memory, batch_size, min_effect, progress, scale)
    units, names = units_of(model, sites)
    tokens = str(TokenSelection.parse(tokens, allowed=PATCHABLE))
    plans = plans_of(model, pairs, tokens, settings)
    count = max(len(plan.positions) for plan in plans)
    result = sweep(model, plans, patches(model, units, count), settings)
    return scores_of(model, plans, result, settings, names, tokens)


def scores_of(
    model: Lvlm,
    plans: Sequence[PairPlan],
    result: SweepResult,
    settings: Settings,
    names: Sequence[str],
    tokens: str,
    through: str = "",
) -> PatchScores:
    """Return the result of a sweep as scores; raise `PatchError` if more than half of the pairs are excluded."""
    check_enough_pairs(result.clean, result.corrupt, result.used, settings.min_effect)
    count = result.effects.shape[2]
    return PatchScores(
        result.effects[result.used],
        result.clean[result.used],
        result.corrupt[result.used],
        sites=tuple(names),
        positions=tuple(str(k - count + 1) for k in range(count)) if tokens.endswith(":each") else (tokens,),
        path="shared prefix" if result.shared else "whole forwards",
        through=through,
        **record_of(model, plans, result.used, tokens, settings),
        provenance=_provenance(settings),
    )


def scale_of(pairs: Sequence[CounterfactualPair], scale: float | None) -> float | None:
    """Return the scale of effects: as given, or 1 for placebo pairs, or None for the difference of each pair.

    Raises
    ------
    PatchError
        If some pairs are placebos, others not, and no scale is given.
    ConfigError
        For a scale that is not finite and above 0.
    """
    if scale is not None and not 0 < scale < math.inf:
        msg = f"scale={scale} must be finite and above 0, such as HeadScores.scale of other pairs"
        raise ConfigError(msg)
    placebos = sum(pair.placebo for pair in pairs)
    if not placebos or scale is not None:
        return scale
    if placebos < len(pairs):
        msg = (
            f"{placebos} of {format_count(len(pairs), 'pair')} are placebos, whose own differences are near 0: patch "
            "them separately, or pass scale=…, the difference that is an effect of 1"
        )
        raise PatchError(msg)
    return 1.0


def settings_of(
    model: Lvlm,
    mode: str,
    metric: Metric,
    memory: int,
    batch_size: int | None,
    min_effect: float | None,
    progress: bool | None,
    scale: float | None = None,
) -> Settings:
    """Return the settings of a sweep; raise `ConfigError` for an unknown option value, `PatchError` in training mode."""
    if mode not in MODES:
        msg = f"unknown mode '{mode}'; choose from {', '.join(MODES)}"
        raise ConfigError(msg)
    default = metric.min_effect if scale is None else 0.0
    least = default if min_effect is None else min_effect
    if (batch_size is not None and batch_size < 1) or memory < 1 or not least >= 0 or math.isinf(least):
        msg = (
            f"batch_size={batch_size} and memory={memory} must be at least 1, min_effect={least} finite and at least 0"
        )
        raise ConfigError(msg)
    check_evaluating(model)
    return Settings("denoise" if mode == "denoise" else "noise", metric, least, memory, batch_size, progress, scale)


def plans_of(model: Lvlm, pairs: Sequence[CounterfactualPair], tokens: str, settings: Settings) -> list[PairPlan]:
    """Check every pair and return its plan; raise `PatchError` if any cannot be patched.

    Placebo pairs are accepted with a scale only. If several pairs have unequal lengths, the message has their number.
    """
    selection = TokenSelection.parse(tokens, allowed=PATCHABLE)
    plans: list[PairPlan] = []
    unequal: list[UnequalLengthError] = []
    with progress_bar(settings.progress) as bar:
        task = bar.add_task("checking pairs", total=len(pairs))
        for pair in pairs:
            try:
                plans.append(plan_pair(model, pair, selection, settings.metric, placebo=settings.scale is not None))
            except UnequalLengthError as error:
                unequal.append(error)
            bar.advance(task)
    if unequal:
        raise combined_error(unequal, len(pairs))
    if not plans:
        msg = "pairs is empty; make pairs with counterfactuals.pairs(data, kind=…)"
        raise PatchError(msg)
    return plans
