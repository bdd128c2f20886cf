"""Exact activation patching: what each head, layer or position carries from the changed image to the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from circuits.execution.memory import MEMORY
from circuits.patching.metrics import LEAST, Metric, MetricName
from circuits.patching.pairs import DIRECTIONS, check_evaluating, check_kept, check_pair, pairs_digest, plan_pair
from circuits.patching.sweep import Direction, Plan, Settings, Swept, patches, sweep
from circuits.patching.targets import Wanted, every_head, units_of
from circuits.results.head_scores import HeadScores
from circuits.results.patch_scores import PatchScores
from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.progress import progress_bar
from lvlm.model import Lvlm

__all__ = ["Direction", "check_evaluating", "check_pair", "pairs_digest", "patch", "patch_heads"]

TOKENS = ("last", "suffix")


def patch_heads(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    tokens: Literal["last", "suffix"] = "last",
    direction: Direction = "denoise",
    *,
    metric: MetricName = "logit_difference",
    memory: int = MEMORY,
    batch_rows: int | None = None,
    min_effect: float | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Patch each attention head of the decoder, one at a time, for each pair, and measure what it does to the answer.

    With M the metric, by default the log-odds of the clean image's answer against the corrupt image's answer, and
    ``PE = (M_patched - M_corrupt) / (M_clean - M_corrupt)``, the effect of a head is

    - ``denoise``: its output of the clean run put into the corrupt run; effect = PE: the share of the difference that
      this head alone brings back;
    - ``noise``: its output of the corrupt run put into the clean run; effect = 1 - PE: the share of the difference
      that is lost with this head alone.

    Either way 0 means that the head carries nothing of what was changed (Wang et al. 2023, arXiv 2211.00593;
    Zhang & Nanda 2024, arXiv 2309.16042). Every effect is an actual run of the model, none is an approximation. All
    heads together cost a few forwards, because what precedes the patched tokens is computed once and shared; a model
    that does not allow it is patched by whole forwards, and says so through the logger ``circuits.execution.full_runner``.

    Parameters
    ----------
    model
        In evaluation mode.
    pairs
        Pairs of equal token length whose true answers differ.
    tokens
        Where a head is patched: ``last``, the last prompt token; ``suffix``, every token after the image at once.
    direction
        ``denoise`` or ``noise``.
    metric
        ``logit_difference``, ``probability``, ``log_probability`` or ``kl``; see `circuits.patching.metrics.Metric`.
    memory
        Bytes that patches running side by side may take, beside the model and the recorded runs; results do not
        depend on it.
    batch_rows
        Most patches that run side by side; None for as many as memory allows.
    min_effect
        Pairs with ``|M_clean - M_corrupt|`` below this are left out and counted in `HeadScores.excluded`; a share of
        next to nothing is noise. By default 0.5 for logits and log-probabilities, 0.05 for the others. With 0, pairs
        whose images are identical are kept: what is the same changes nothing, and every effect is exactly 0.
    progress
        Show progress; by default where standard error is a terminal.

    Returns
    -------
    HeadScores
        Effects ``[n_pairs, n_layers, n_heads]`` of the pairs kept, in their order. Where a layer attends to the image
        alone (Llama-3.2-Vision), its heads are those of its cross-attention.

    Raises
    ------
    PatchError
        Before anything runs, for no pairs, pairs of unlike length or with images at other positions, answers that are
        equal or begin with the same token, a model in training mode, or a budget too small for one patch; afterwards
        where more than half of the pairs fall under `min_effect`.
    ModelError
        Where the metric of a pair, patched or not, is not finite.
    ConfigError
        For an option that does not exist.
    """
    if tokens not in TOKENS:
        msg = f"tokens='{tokens}': choose tokens of {TOKENS}; circuits.patch has more"
        raise ConfigError(msg)
    settings = settings_of(model, direction, metric, memory, batch_rows, min_effect, progress)
    plans = plans_of(model, pairs, tokens, settings)
    found = sweep(model, plans, patches(model, every_head(model)), settings)
    effects = found.effects.reshape(len(plans), model.n_layers, model.n_heads)
    about = {"metric": metric, "path": "shared prefix" if found.shared else "whole forwards"}
    return head_scores_of(
        model, plans, effects, np.stack([found.clean, found.corrupt]), found.kept, tokens, settings, about
    )


def head_scores_of(
    model: Lvlm,
    plans: Sequence[Plan],
    effects: np.ndarray,
    baseline: np.ndarray,
    kept: np.ndarray,
    tokens: str,
    settings: Settings,
    provenance: Mapping[str, Any],
) -> HeadScores:
    """Return effects of all pairs ``[n_pairs, n_layers, n_heads]`` as scores of those that are kept.

    `baseline` is the metric of the clean and of the corrupt runs, ``[2, n_pairs]``. Raises `PatchError` where more than half
    of the pairs are not kept.
    """
    check_kept(baseline[0], baseline[1], kept, settings.min_effect)
    chosen = [plan.pair for plan, keep in zip(plans, kept, strict=True) if keep]
    return HeadScores(
        effects=effects[kept],
        clean=baseline[0, kept],
        corrupt=baseline[1, kept],
        ids=tuple(p.clean.id for p in chosen),
        groups=tuple(p.group for p in chosen),
        levels=tuple(p.clean.level for p in chosen),
        kinds=tuple(p.kind for p in chosen),
        tokens=tokens,
        direction=settings.direction,
        min_effect=settings.min_effect,
        excluded=int((~kept).sum()),
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
        pairs_digest=pairs_digest([plan.pair for plan in plans]),
        provenance=provenance,
    )


def patch(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    sites: Wanted | Sequence[Wanted] = "z",
    tokens: str = "last",
    direction: Direction = "denoise",
    *,
    metric: MetricName = "logit_difference",
    memory: int = MEMORY,
    batch_rows: int | None = None,
    min_effect: float | None = None,
    progress: bool | None = None,
) -> PatchScores:
    """Patch sites of the decoder at tokens, each by itself, for each pair; see `patch_heads` for what an effect is.

    Parameters
    ----------
    model
        In evaluation mode.
    pairs
        Pairs of equal token length whose true answers differ.
    sites
        One or several of: a component of every layer (``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``,
        ``mlp_out``; ``z`` for each head apart), a `Site`, a `Head`, or a tuple or set of heads that are patched together.
    tokens
        ``last``; ``suffix`` (every token after the image), ``question``, ``image``, ``object`` or ``all`` at once, or each
        apart with ``:each``, as in ``suffix:each``; or positions counted from 0, ``12,13``. What lies at or after the first
        patched position is computed anew from the patched layer on, so that early positions cost more than late ones.
    direction, metric, memory, batch_rows, min_effect, progress
        As in `patch_heads`.

    Returns
    -------
    PatchScores
        Effects ``[n_pairs, n_sites, n_positions]`` of the pairs kept, in their order.

    Raises
    ------
    PatchError
        As `patch_heads`, and for tokens that a pair does not have.
    ModelError
        Where the metric of a pair, patched or not, is not finite.
    SiteError
        For a site or head that the model does not have or that has no positions.
    ConfigError
        For an option that does not exist.
    """
    settings = settings_of(model, direction, metric, memory, batch_rows, min_effect, progress)
    units, names = units_of(model, sites)
    plans = plans_of(model, pairs, tokens, settings)
    count = max(len(plan.positions) for plan in plans)
    found = sweep(model, plans, patches(model, units, count), settings)
    return scores_of(model, pairs, plans, found, settings, names, tokens)


def scores_of(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    plans: Sequence[Plan],
    found: Swept,
    settings: Settings,
    names: Sequence[str],
    tokens: str,
    through: str = "",
) -> PatchScores:
    """Return what a sweep found as a result; raises `PatchError` where most pairs were left out."""
    check_kept(found.clean, found.corrupt, found.kept, settings.min_effect)
    chosen = [plan.pair for plan, keep in zip(plans, found.kept, strict=True) if keep]
    count = found.effects.shape[2]
    return PatchScores(
        effects=found.effects[found.kept],
        clean=found.clean[found.kept],
        corrupt=found.corrupt[found.kept],
        sites=tuple(names),
        positions=tuple(str(k - count + 1) for k in range(count)) if tokens.endswith(":each") else (tokens,),
        ids=tuple(p.clean.id for p in chosen),
        groups=tuple(p.group for p in chosen),
        levels=tuple(p.clean.level for p in chosen),
        kinds=tuple(p.kind for p in chosen),
        tokens=tokens,
        direction=settings.direction,
        metric=settings.metric.name,
        min_effect=settings.min_effect,
        excluded=int((~found.kept).sum()),
        path="shared prefix" if found.shared else "whole forwards",
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
        pairs_digest=pairs_digest(pairs),
        through=through,
    )


def settings_of(
    model: Lvlm,
    direction: str,
    metric: MetricName,
    memory: int,
    batch_rows: int | None,
    min_effect: float | None,
    progress: bool | None,
) -> Settings:
    """Return how a sweep runs; raises `ConfigError` for an option that does not exist, `PatchError` while training."""
    if direction not in DIRECTIONS:
        msg = f"direction='{direction}': choose one of {DIRECTIONS}"
        raise ConfigError(msg)
    measured = Metric(metric)
    least = LEAST[metric] if min_effect is None else min_effect
    if (batch_rows is not None and batch_rows < 1) or memory < 1 or not least >= 0 or math.isinf(least):
        msg = f"batch_rows={batch_rows} and memory={memory} must be at least 1, min_effect={least} at least 0"
        raise ConfigError(msg)
    check_evaluating(model)
    return Settings("denoise" if direction == "denoise" else "noise", measured, least, memory, batch_rows, progress)


def plans_of(model: Lvlm, pairs: Sequence[CounterfactualPair], tokens: str, settings: Settings) -> list[Plan]:
    """Check every pair and return what is known of each; raises `PatchError` for a pair that cannot be patched."""
    plans = []
    with progress_bar(settings.progress) as bar:
        task = bar.add_task("checking pairs", total=len(pairs))
        for pair in pairs:
            plans.append(plan_pair(model, pair, tokens, settings.metric))
            bar.advance(task)
    if not plans:
        msg = "no pairs to patch: counterfactuals.pairs(data, kind=…) makes them"
        raise PatchError(msg)
    return plans
