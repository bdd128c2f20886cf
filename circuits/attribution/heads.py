"""Attribution patching: estimate the effect of a patch from one gradient instead of a patched run.

All heads at all positions cost two forward passes and one backward pass in total. The estimate is exact only if the
model is linear between the two runs; `circuits.patch_heads` is exact. Sources: Nanda 2023, "Attribution patching";
Syed et al. 2023, arXiv 2310.10348; GradDrop and the query/key fix: Kramár et al. 2024 (AtP*), arXiv 2403.00745;
gradients along the path from one run to the other: Hanna et al. 2024 (EAP-IG), arXiv 2403.17806.

`heads` and `nodes` estimate the effects of `patch_heads` and `patch`; `inputs`, of patching a head's queries, keys or
values; `edges`, of patching a node in the input of one other node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from circuits.attribution.estimates import GradientSettings, Point, check_gradient_settings, estimate
from circuits.head_set import HeadSet
from circuits.patching.activation import head_scores_of, plans_of, scores_of, settings_of
from circuits.patching.metrics import MetricFunction, gradient_metric
from circuits.patching.sweep import Mode, SweepResult
from circuits.patching.targets import Target, every_head, units_of
from circuits.results.head_scores import HeadScores
from circuits.results.patch_scores import PatchScores
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ConfigError
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from lvlm.token_selection import PATCHABLE, TokenSelection

__all__ = ["heads", "nodes"]

TOKENS = ("last", "suffix:all", "image:all", "question:all", "prefix:all", "object:all", "all")
EMBEDDINGS = "decoder.L0.resid_pre"


def heads(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    tokens: str = "last",
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    point: Point = "run",
    steps: int = 5,
    drop: bool = False,
    min_effect: float | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> HeadScores:
    """Estimate the effect of patching each head: ``(z_source - z_run) . dM/dz``, summed over positions.

    Effects are shares of ``M_clean - M_corrupt`` with the signs of `patch_heads`, so they are comparable.

    Parameters
    ----------
    model
        In evaluation mode, with a differentiable attention implementation.
    pairs
        As for `patch_heads`.
    tokens
        Positions of the patch, all patched jointly: ``last``, ``suffix:all``, ``question:all``, ``object:all``,
        ``image:all`` or ``all``.
    mode
        ``denoise``: patch the corrupt run with clean values; ``noise``: patch the clean run with corrupt values.
    metric
        Metric M: ``logit_difference``, ``probability``, or a differentiable function, as for `patch_heads`.
    point
        Where the gradient is computed: ``run``, in the patched run (with ``denoise`` TransformerLens' choice, with
        ``noise`` that of the papers); ``source``, in the source run; ``path``, the mean over `steps` points on the straight
        line between the embeddings of both, ``run + k / steps (source - run)`` for k = 1 ... steps.
    steps
        Number of points, for ``path``.
    drop
        GradDrop: the sum over layers of the absolute estimate without that layer's gradient, divided by the number of
        layers minus one. Effects are then magnitudes, never negative. One backward pass per layer.
    min_effect
        As for `patch_heads`, in units of the metric.
    batch_size
        Number of pairs per batch.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Returns
    -------
    HeadScores
        Estimated effects ``[n_pairs, n_layers, n_heads]``; `provenance` states that they are estimates.

    Raises
    ------
    ConfigError
        If an option has an unknown value.
    PatchError
        As `patch_heads`.
    ModelError
        If no gradient reaches a site; for an attention that cannot be differentiated, before any forward pass.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> gs.attribution.heads(model, pairs).top(2)
    (Head(layer=4, head=7), Head(layer=5, head=3))
    """
    tokens = str(TokenSelection.parse(tokens, allowed=TOKENS))
    how = GradientSettings(mode, point, steps, drop)
    check_gradient_settings(model, how, batch_size)
    settings = settings_of(model, mode, gradient_metric(metric), 1, None, min_effect, progress)
    plans = plans_of(model, pairs, tokens, settings)
    estimates = estimate(model, plans, every_head(model), how, settings, batch_size)
    effects = estimates.effects[..., 0].reshape(len(plans), model.n_layers, model.n_heads)
    baseline = np.stack([estimates.clean, estimates.corrupt])
    return head_scores_of(model, plans, effects, baseline, estimates.used, tokens, settings, how.about)


def nodes(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    sites: Target | Sequence[Target] = ("embeddings", "z", "mlp_out"),
    *,
    tokens: str = "all:each",
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    point: Point = "run",
    steps: int = 5,
    drop: bool = False,
    min_effect: float | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> PatchScores:
    """Estimate the effects of `circuits.patch` at any sites and positions, all from the same gradients.

    Parameters
    ----------
    model, pairs, mode, metric, min_effect, batch_size, progress
        As for `heads`.
    sites
        Sites to patch: as for `patch`, and ``embeddings``, the input of the first decoder layer. By default
        embeddings, every head and every MLP.
    tokens
        Positions to patch, as for `patch`; by default each position separately.
    point, steps, drop
        As for `heads`.

    Returns
    -------
    PatchScores
        Estimated effects ``[n_pairs, n_sites, n_positions]`` of the pairs used, named as in `patch`.

    Raises
    ------
    ConfigError, PatchError, ModelError
        As `heads`.
    SiteError
        As `patch`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> gs.attribution.nodes(model, pairs, ["decoder.L5.resid_post", "L4.H7"], tokens="last").mean.shape
    (2, 1)
    """
    how = GradientSettings(mode, point, steps, drop)
    check_gradient_settings(model, how, batch_size)
    settings = settings_of(model, mode, gradient_metric(metric), 1, None, min_effect, progress)
    targets = [sites] if isinstance(sites, str | Site | Head | HeadSet) else sites
    tokens = str(TokenSelection.parse(tokens, allowed=PATCHABLE))
    units, names = units_of(model, [EMBEDDINGS if target == "embeddings" else target for target in targets])
    if drop and any(site.component == "resid_mid" for unit in units for site, _ in unit):
        msg = "drop=True does not support 'resid_mid', which no single layer writes; remove it from sites, or pass drop=False"
        raise ConfigError(msg)
    plans = plans_of(model, pairs, tokens, settings)
    estimates: SweepResult = estimate(model, plans, units, how, settings, batch_size)
    scores = scores_of(model, plans, estimates, settings, names, tokens)
    return replace(scores, path=how.text)
