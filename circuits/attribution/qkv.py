"""Estimate the effect of patching a head's queries, keys or values from one gradient, with an exact softmax.

Attention saturates: where one key has all the weight, the gradient at queries and keys almost vanishes, and plain
attribution patching misses the effect of a patch that moves attention to another key. AtP* (Kramár et al. 2024, arXiv
2403.00745, section 3.1) computes the pattern under the patch exactly and linearizes only what follows it:
``sum_k (A_patched - A_run)_k . dM/dA_k``, for each query with all keys unchanged, and for each key with all other keys
unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.attention_nodes import AttentionRecord, check_exposable, expose_attention
from circuits.attribution.estimates import GradientSettings, Point, Sides, check_gradient_settings, groups, usable
from circuits.patching.activation import head_scores_of, plans_of, settings_of
from circuits.patching.metrics import MetricFunction, gradient_metric
from circuits.patching.sweep import Mode
from circuits.results.head_scores import HeadScores
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ConfigError, ModelError
from lvlm.model import Inputs, Lvlm
from lvlm.token_selection import TokenSelection

Part = Literal["q", "k", "v"]
PARTS: tuple[Part, ...] = ("q", "k", "v")
TOKENS = ("last", "suffix:all", "image:all", "question:all", "prefix:all", "object:all", "all")


def inputs(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    part: Part = "q",
    *,
    tokens: str = "all",
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    fix: bool = True,
    point: Point = "run",
    steps: int = 5,
    min_effect: float | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> HeadScores:
    """Estimate the effect of patching each head's queries, keys or values, one position at a time.

    Queries and keys are those that the softmax receives, after positional encoding. Where several heads share keys and
    values, each head has its own copy: the effect is that of one head reading a patched key.

    Parameters
    ----------
    model
        In evaluation mode. Its attention must use transformers' table of attention functions.
    pairs
        As for `attribution.heads`.
    part
        ``q``, ``k`` or ``v``.
    tokens
        Positions of the queries (``q``), or of the keys and values (``k``, ``v``). The effects of single positions are
        summed.
    mode, metric
        As for `attribution.heads`.
    fix
        The query/key fix of AtP*: compute the attention pattern under the patch exactly. False for plain attribution
        patching. For values, which do not pass through the softmax, both are the same.
    point, steps, min_effect, progress
        As for `attribution.heads`; patterns start from the patched run, wherever gradients are computed.
    batch_size
        Number of pairs per batch; with `fix`, the patterns of all layers stay in memory.

    Returns
    -------
    HeadScores
        Estimated effects ``[n_pairs, n_layers, n_heads]``.

    Raises
    ------
    ConfigError
        If an option has an unknown value.
    PatchError
        As `patch_heads`.
    ModelError
        If the family's queries and keys cannot be read, or its attention cannot be differentiated; raised before any
        forward pass.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> gs.attribution.inputs(model, pairs, "v").shape
    (6, 8)
    """
    if part not in PARTS:
        msg = f"unknown part '{part}'; choose from {', '.join(PARTS)}"
        raise ConfigError(msg)
    tokens = str(TokenSelection.parse(tokens, allowed=TOKENS))
    how = GradientSettings(mode, point, steps)
    check_gradient_settings(model, how, batch_size)
    check_exposable(model)
    settings = settings_of(model, mode, gradient_metric(metric), 1, None, min_effect, progress)
    plans = plans_of(model, pairs, tokens, settings)
    effects = np.full((len(plans), model.n_layers, model.n_heads), np.nan, np.float32)
    baseline = np.zeros((2, len(plans)), np.float32)
    fixed = fix and part != "v"

    def estimate_batch(sides: Sides) -> tuple[np.ndarray, Tensor, Tensor]:
        return _estimates(model, sides, part, how, fix=fixed)

    for group, share, metrics in groups(model, plans, how, settings, batch_size, estimate_batch, "estimating inputs"):
        effects[group], baseline[:, group] = share, metrics
    used = usable(baseline[0], baseline[1], settings.min_effect)
    about = {**how.about, "part": part, "fix": fixed}
    return head_scores_of(model, plans, effects, baseline, used, tokens, settings, about)


@dataclass(frozen=True, eq=False)
class _QkvRun:
    """One run: attention inputs, and the derivative of the metric by them."""

    records: dict[int, AttentionRecord]
    slopes: tuple[Tensor, ...]
    """Gradients by layer: of the pattern ``[P, H, T, T]``, or of queries, keys or values ``[P, H, T, d]``; empty unless
    requested."""
    metric: Tensor
    embeddings: Tensor


def _estimates(
    model: Lvlm, sides: Sides, part: Part, how: GradientSettings, *, fix: bool
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return estimated changes of the metric ``[P, layers, heads]``, and the metric of both runs."""
    name = "pattern" if fix else {"q": "query", "k": "key", "v": "value"}[part]
    source, run = (
        _run_once(model, side, sides, name, differentiate=how.point == point)
        for point, side in (("source", sides.source), ("run", sides.run))
    )
    if how.point == "path":
        way = source.embeddings - run.embeddings
        at = [_run_once(model, sides.run, sides, name, embeddings=run.embeddings + share * way) for share in how.shares]
    else:
        at = [source if how.point == "source" else run]
    positions = list(sides.members[0].positions[0])
    layers = []
    for i in range(model.n_layers):
        slope = torch.stack([record.slopes[i] for record in at]).mean(0)
        a, b = source.records[i], run.records[i]
        if not fix:
            each = ((getattr(a, name) - getattr(b, name)) * slope).sum(-1)  # [P, H, T]
        elif part == "q":
            each = _moved_queries(a, b, slope)
        else:
            each = _moved_keys(a, b, slope)
        layers.append(each[..., positions].sum(-1))
    return torch.stack(layers, dim=1).double().cpu().numpy(), source.metric, run.metric


def _moved_queries(source: AttentionRecord, run: AttentionRecord, slope: Tensor) -> Tensor:
    """Return the change of the metric from each query's patched attention, ``[P, H, T]``."""
    before, after = (run.rule.pattern_of(record.query, run.key) for record in (run, source))
    return ((after - before) * slope).sum(-1)


def _moved_keys(source: AttentionRecord, run: AttentionRecord, slope: Tensor) -> Tensor:
    """Return the change of the metric from each key's patch, through the attention of all queries, ``[P, H, T]``.

    If one score changes, a query's weight on that key is a logistic function of the score, and the other keys share the
    remaining weight in the same proportions: ``(p' - p) (g_key - mean of g over the others)``. So all keys cost one
    pattern in total, not one pattern each.
    """
    before, after = (run.rule.scores(run.query, record.key) for record in (run, source))  # [P, H, queries, keys]
    top = before.amax(-1, keepdim=True)
    weight = (before - top).exp()
    slope = slope.to(weight)
    # Exclude the largest weight before summing: subtracting it from the sum would leave only rounding error.
    largest = torch.zeros_like(weight).scatter_(-1, before.argmax(-1, keepdim=True), 1).bool()
    remaining = weight.masked_fill(largest, 0)
    others = torch.where(largest, remaining.sum(-1, keepdim=True), weight.sum(-1, keepdim=True) - weight)
    moved = weight * slope
    mean = torch.where(
        largest, (remaining * slope).sum(-1, keepdim=True), moved.sum(-1, keepdim=True) - moved
    ) / others.clamp_min(torch.finfo(weight.dtype).tiny)
    level = top + others.log()
    change = torch.sigmoid(after - level) - torch.sigmoid(before - level)
    alone = others == 0  # a key without competitors keeps all the weight
    return (change * (slope - mean)).masked_fill(alone, 0).sum(-2)


def _run_once(
    model: Lvlm,
    model_inputs: Inputs,
    sides: Sides,
    name: str,
    *,
    embeddings: Tensor | None = None,
    differentiate: bool = True,
) -> _QkvRun:
    """Run once and return the attention inputs and the derivative of the metric by them."""
    start: list[Tensor] = []

    def enter(x: Tensor) -> Tensor:
        start.append((x if embeddings is None else embeddings).detach().clone().requires_grad_(differentiate))
        return start[0]

    hook = model.place("decoder", 0, "resid_pre").edit(enter)
    try:
        with torch.set_grad_enabled(differentiate), expose_attention(model, patterns=name == "pattern") as attention:
            score = sides.metric(model.forward(model_inputs)[:, -1])
            records = attention.records
    finally:
        hook.remove()
    if len(records) != model.n_layers:
        missing = next(i for i in range(model.n_layers) if i not in records)
        msg = (
            f"{model.name}: layer {missing} does not call its attention through transformers' ALL_ATTENTION_FUNCTIONS, so its "
            "queries and keys cannot be read; use attribution.heads, attribution.nodes or circuits.patch_paths"
        )
        raise ModelError(msg)
    slopes: tuple[Tensor, ...] = ()
    if differentiate:
        nodes = [getattr(records[i], name) for i in range(model.n_layers)]
        try:
            with torch.enable_grad():  # the sum below needs a gradient
                slopes = torch.autograd.grad(score.sum(), nodes, materialize_grads=True)
        except RuntimeError as error:
            msg = f"{model.name}: no gradient reaches its attention: {error}"
            raise ModelError(msg) from error
    return _QkvRun({i: _detached(record) for i, record in records.items()}, slopes, score.detach(), start[0].detach())


def _detached(record: AttentionRecord) -> AttentionRecord:
    query, key, value = record.query.detach(), record.key.detach(), record.value.detach()
    return AttentionRecord(
        query, record.shared_key.detach(), record.shared_value.detach(), key, value, None, record.rule
    )
