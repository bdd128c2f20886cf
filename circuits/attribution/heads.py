"""Attribution patching: what a patch would do, estimated from one gradient instead of run.

Every head at every position costs two forwards and one backward pass in all. It is an estimate, exact only as far as
the model is linear between the two runs; `circuits.patch_heads` is exact. Sources: Nanda 2023, "Attribution patching";
Syed et al. 2023, arXiv 2310.10348; GradDrop and the query/key fix: Kramár et al. 2024 (AtP*), arXiv 2403.00745;
gradients along the way from one run to the other: Hanna et al. 2024 (EAP-IG), arXiv 2403.17806.

`heads` and `nodes` estimate what `patch_heads` and `patch` do; `inputs`, what patching a head's queries, keys or values
would do; `edges`, what one node tells another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from circuits.attribution.estimates import How, Point, check_how, estimate
from circuits.patching.activation import head_scores_of, plans_of, scores_of, settings_of
from circuits.patching.metrics import LEAST
from circuits.patching.sweep import Direction, Swept
from circuits.patching.targets import Wanted, every_head, units_of
from circuits.results.head_scores import HeadScores
from circuits.results.patch_scores import PatchScores
from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError
from lvlm.model import Lvlm

__all__ = ["heads", "nodes"]

TOKENS = ("last", "suffix", "image", "question", "object", "all")
EMBEDDINGS = "decoder.L0.resid_pre"
_METRIC = "logit_difference"


def heads(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    tokens: Literal["last", "suffix", "image", "question", "object", "all"] = "last",
    direction: Direction = "denoise",
    *,
    point: Point = "run",
    steps: int = 5,
    drop: bool = False,
    min_effect: float = LEAST[_METRIC],
    batch_pairs: int = 16,
    progress: bool | None = None,
) -> HeadScores:
    """Estimate what patching each head would do to the answer: ``(z_source - z_run) . dLD/dz``, summed over positions.

    Effects are shares of ``LD_clean - LD_corrupt`` with the signs of `patch_heads`, so that both can be compared.

    Parameters
    ----------
    model
        In evaluation mode, with an attention that can be differentiated.
    pairs
        As for `patch_heads`.
    tokens
        Where a head would be patched, at all of these at once: ``last``, ``suffix``, ``question``, ``object``, ``image`` or
        ``all``.
    direction
        ``denoise``: the corrupt run would be patched with the clean one's values; ``noise``: the other way round.
    point
        Where the gradient is taken: ``run``, in the run that would be patched (with ``denoise`` TransformerLens' choice,
        with ``noise`` that of the papers); ``source``, in the other; ``path``, the mean over `steps` points on the straight
        way between the embeddings of both, ``run + k / steps (source - run)`` for k = 1 ... steps.
    steps
        Points on the way, for ``path``.
    drop
        GradDrop: the mean over layers of the absolute estimate with that layer's own gradient left out, divided by one
        less than their number. Effects are then sizes, never negative. One backward pass a layer.
    min_effect
        As for `patch_heads`, in logits.
    batch_pairs
        Pairs side by side.
    progress
        Show progress; by default where standard error is a terminal.

    Returns
    -------
    HeadScores
        Estimated effects ``[n_pairs, n_layers, n_heads]``; `provenance` says that they are estimates.

    Raises
    ------
    ConfigError
        For an option that does not exist.
    PatchError
        As `patch_heads`.
    ModelError
        Where no gradient can be had; for an attention that cannot be differentiated, before anything runs.
    """
    if tokens not in TOKENS:
        msg = f"tokens='{tokens}': choose {', '.join(TOKENS)}"
        raise ConfigError(msg)
    how = How(direction, point, steps, drop)
    check_how(model, how, batch_pairs)
    settings = settings_of(model, direction, _METRIC, 1, None, min_effect, progress)
    plans = plans_of(model, pairs, tokens, settings)
    found = estimate(model, plans, every_head(model), how, settings, batch_pairs)
    effects = found.effects[..., 0].reshape(len(plans), model.n_layers, model.n_heads)
    baseline = np.stack([found.clean, found.corrupt])
    return head_scores_of(model, plans, effects, baseline, found.kept, tokens, settings, how.about)


def nodes(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    sites: Wanted | Sequence[Wanted] = ("embeddings", "z", "mlp_out"),
    tokens: str = "all:each",
    direction: Direction = "denoise",
    *,
    point: Point = "run",
    steps: int = 5,
    drop: bool = False,
    min_effect: float = LEAST[_METRIC],
    batch_pairs: int = 16,
    progress: bool | None = None,
) -> PatchScores:
    """Estimate what `circuits.patch` would do at any sites and positions, all of them from the same gradients.

    Parameters
    ----------
    model, pairs, direction, min_effect, progress
        As for `heads`.
    sites
        What would be patched: as for `patch`, and ``embeddings``, what the first decoder layer is given. By default
        embeddings, every head and every MLP.
    tokens
        Where, as for `patch`; by default each position apart.
    point, steps, drop, batch_pairs
        As for `heads`.

    Returns
    -------
    PatchScores
        Estimated effects ``[n_pairs, n_sites, n_positions]`` of the pairs kept, named as those of `patch`.

    Raises
    ------
    ConfigError, PatchError, ModelError
        As `heads`.
    SiteError
        As `patch`.
    """
    how = How(direction, point, steps, drop)
    check_how(model, how, batch_pairs)
    settings = settings_of(model, direction, _METRIC, 1, None, min_effect, progress)
    asked: Wanted | Sequence[Wanted] = EMBEDDINGS if sites == "embeddings" else sites
    if isinstance(asked, list | tuple):
        asked = [EMBEDDINGS if one == "embeddings" else one for one in asked] if "embeddings" in asked else asked
    units, names = units_of(model, asked)
    if drop and any(site.component == "resid_mid" for unit in units for site, _ in unit):
        msg = "drop=True: no one layer writes 'resid_mid'; leave it out, or ask without drop"
        raise ConfigError(msg)
    plans = plans_of(model, pairs, tokens, settings)
    found: Swept = estimate(model, plans, units, how, settings, batch_pairs)
    scores = scores_of(model, pairs, plans, found, settings, names, tokens)
    return replace(scores, path=how.text)
