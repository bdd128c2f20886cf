"""What patching a head's queries, keys or values would do, estimated from one gradient, with the softmax computed anew.

Attention saturates: where one key has all the weight, the gradient at queries and keys is next to nothing, and plain
attribution patching sees no effect where a patch moves attention to another key. AtP* (Kramár et al. 2024, arXiv
2403.00745, section 3.1) computes the pattern that a patch makes and estimates only what follows it:
``sum_k (A_patched - A_run)_k . dM/dA_k``, for each query with all keys as they are, and for each key with all others as
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.attention_nodes import Opened, check_opened, opened
from circuits.attribution.estimates import How, Point, Sides, check_how, groups, kept_of
from circuits.patching.activation import head_scores_of, plans_of, settings_of
from circuits.patching.metrics import LEAST
from circuits.patching.sweep import Direction
from circuits.results.head_scores import HeadScores
from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError, ModelError
from lvlm.model import Inputs, Lvlm

Part = Literal["q", "k", "v"]
PARTS: tuple[Part, ...] = ("q", "k", "v")
TOKENS = ("last", "suffix", "image", "question", "object", "all")
_METRIC = "logit_difference"


def inputs(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    part: Part = "q",
    tokens: Literal["last", "suffix", "image", "question", "object", "all"] = "all",
    direction: Direction = "denoise",
    *,
    fix: bool = True,
    point: Point = "run",
    steps: int = 5,
    min_effect: float = LEAST[_METRIC],
    batch_pairs: int = 8,
    progress: bool | None = None,
) -> HeadScores:
    """Estimate what patching each head's queries, keys or values would do to the answer, one position at a time.

    Queries and keys are those that the softmax gets, positions applied. Where several heads share keys and values, each
    is thought to have its own copy: an effect is that of one head reading another key.

    Parameters
    ----------
    model
        In evaluation mode. Its attention has to go through transformers' table of attention functions.
    pairs
        As for `attribution.heads`.
    part
        ``q``, ``k`` or ``v``.
    tokens
        At which positions: of the queries for ``q``, of what is attended to for ``k`` and ``v``. The effects of single
        positions are added up.
    direction
        As for `attribution.heads`.
    fix
        The query/key fix of AtP*: compute the attention that a patch makes, and estimate from there on. False for
        plain attribution patching. For values, which no softmax follows, both are the same.
    point, steps, min_effect, progress
        As for `attribution.heads`; patterns are moved from the run that would be patched, wherever gradients are taken.
    batch_pairs
        Pairs side by side; with the fix, all layers' patterns of each are held in memory.

    Returns
    -------
    HeadScores
        Estimated effects ``[n_pairs, n_layers, n_heads]``.

    Raises
    ------
    ConfigError
        For an option that does not exist.
    PatchError
        As `patch_heads`.
    ModelError
        For a family whose queries and keys cannot be read, or an attention that cannot be differentiated: before
        anything runs.
    """
    for name, value, allowed in (("part", part, PARTS), ("tokens", tokens, TOKENS)):
        if value not in allowed:
            msg = f"{name}='{value}': choose {', '.join(allowed)}"
            raise ConfigError(msg)
    how = How(direction, point, steps)
    check_how(model, how, batch_pairs)
    check_opened(model)
    settings = settings_of(model, direction, _METRIC, 1, None, min_effect, progress)
    plans = plans_of(model, pairs, tokens, settings)
    effects = np.full((len(plans), model.n_layers, model.n_heads), np.nan, np.float32)
    baseline = np.zeros((2, len(plans)), np.float32)
    fixed = fix and part != "v"

    def do(sides: Sides) -> tuple[np.ndarray, Tensor, Tensor]:
        return _estimates(model, sides, part, how, fix=fixed)

    for group, share, metrics in groups(model, plans, how, settings, batch_pairs, do, "estimating inputs"):
        effects[group], baseline[:, group] = share, metrics
    kept = kept_of(baseline[0], baseline[1], settings.min_effect)
    about = {**how.about, "part": part, "fix": fixed}
    return head_scores_of(model, plans, effects, baseline, kept, tokens, settings, about)


@dataclass(frozen=True, eq=False)
class _Look:
    """One run: what attention was given, and how the metric changes with it."""

    seen: dict[int, Opened]
    slopes: tuple[Tensor, ...]
    """By layer: of the pattern ``[P, H, T, T]``, or of queries, keys or values ``[P, H, T, d]``; empty where none was
    asked for."""
    metric: Tensor
    embeddings: Tensor


def _estimates(model: Lvlm, sides: Sides, part: Part, how: How, *, fix: bool) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return estimated changes of the metric ``[P, layers, heads]``, and the metric of both runs."""
    name = "pattern" if fix else {"q": "query", "k": "key", "v": "value"}[part]
    source, run = (
        _look(model, given, sides, name, differentiate=how.point == point)
        for point, given in (("source", sides.source), ("run", sides.run))
    )
    if how.point == "path":
        way = source.embeddings - run.embeddings
        at = [_look(model, sides.run, sides, name, embeddings=run.embeddings + share * way) for share in how.shares]
    else:
        at = [source if how.point == "source" else run]
    positions = list(sides.members[0].positions[0])
    found = []
    for i in range(model.n_layers):
        slope = torch.stack([one.slopes[i] for one in at]).mean(0)
        a, b = source.seen[i], run.seen[i]
        if not fix:
            each = ((getattr(a, name) - getattr(b, name)) * slope).sum(-1)  # [P, H, T]
        elif part == "q":
            each = _moved_queries(a, b, slope)
        else:
            each = _moved_keys(a, b, slope)
        found.append(each[..., positions].sum(-1))
    return torch.stack(found, dim=1).double().cpu().numpy(), source.metric, run.metric


def _moved_queries(source: Opened, run: Opened, slope: Tensor) -> Tensor:
    """Return what each query's new attention changes of the metric, ``[P, H, T]``."""
    before, after = (run.rule.replaced(one.query, run.key) for one in (run, source))
    return ((after - before) * slope).sum(-1)


def _moved_keys(source: Opened, run: Opened, slope: Tensor) -> Tensor:
    """Return what each key's patch changes of the metric through all queries' attention, ``[P, H, T]``.

    With one score changed, a query's weight on that key is a logistic function of it, and the others keep their shares
    of the rest: ``(p' - p) (g_key - mean of g over the others)``. So all keys together cost one pattern, not one each.
    """
    before, after = (run.rule.scores(run.query, one.key) for one in (run, source))  # [P, H, queries, keys]
    top = before.amax(-1, keepdim=True)
    weight = (before - top).exp()
    slope = slope.to(weight)
    # The largest is left out of the sum before it is taken: taken away afterwards, it would leave rounding errors alone.
    largest = torch.zeros_like(weight).scatter_(-1, before.argmax(-1, keepdim=True), 1).bool()
    rest = weight.masked_fill(largest, 0)
    others = torch.where(largest, rest.sum(-1, keepdim=True), weight.sum(-1, keepdim=True) - weight)
    moved = weight * slope
    mean = torch.where(
        largest, (rest * slope).sum(-1, keepdim=True), moved.sum(-1, keepdim=True) - moved
    ) / others.clamp_min(torch.finfo(weight.dtype).tiny)
    level = top + others.log()
    change = torch.sigmoid(after - level) - torch.sigmoid(before - level)
    alone = others == 0  # a key that no other stands beside keeps all the weight
    return (change * (slope - mean)).masked_fill(alone, 0).sum(-2)


def _look(
    model: Lvlm,
    given: Inputs,
    sides: Sides,
    name: str,
    *,
    embeddings: Tensor | None = None,
    differentiate: bool = True,
) -> _Look:
    """Run once and return what attention was given and how the metric changes with it."""
    start: list[Tensor] = []

    def enter(x: Tensor) -> Tensor:
        start.append((x if embeddings is None else embeddings).detach().clone().requires_grad_(differentiate))
        return start[0]

    hook = model.place("decoder", 0, "resid_pre").edit(enter)
    try:
        with torch.set_grad_enabled(differentiate), opened(model, patterns=name == "pattern") as attention:
            score = sides.metric(model.forward(given)[:, -1])
            seen = attention.seen
    finally:
        hook.remove()
    if len(seen) != model.n_layers:
        missing = next(i for i in range(model.n_layers) if i not in seen)
        msg = (
            f"{model.name}: layer {missing} does not attend through transformers' table of attention functions, so that "
            "its queries and keys cannot be read"
        )
        raise ModelError(msg)
    slopes: tuple[Tensor, ...] = ()
    if differentiate:
        nodes = [getattr(seen[i], name) for i in range(model.n_layers)]
        try:
            with torch.enable_grad():  # the sum is part of what is differentiated
                slopes = torch.autograd.grad(score.sum(), nodes, materialize_grads=True)
        except RuntimeError as error:
            msg = f"{model.name}: no gradient reaches its attention: {error}"
            raise ModelError(msg) from error
    return _Look({i: _detached(one) for i, one in seen.items()}, slopes, score.detach(), start[0].detach())


def _detached(one: Opened) -> Opened:
    query, key, value = one.query.detach(), one.key.detach(), one.value.detach()
    return Opened(query, one.shared_key.detach(), one.shared_value.detach(), key, value, None, one.rule)
