"""Attention at some queries of one layer: scores before the softmax, weights, and outputs of heads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lvlm.decoding.row_layout import RowLayout


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Attention of one decoder layer at the last queries of a forward pass; editors return a changed copy.

    All tensors are float32, or float64 in models of that precision. Keys include those of the cache.

    Examples
    --------
    >>> import torch
    >>> from lvlm.decoding.attention_rows import AttentionRows
    >>> from lvlm.decoding.row_layout import RowLayout
    >>> image = torch.tensor([[True, False]])
    >>> layout = RowLayout(torch.tensor([0]), image, torch.ones_like(image), prompt=2)
    >>> scores, values = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0], [3.0]]]])
    >>> rows = AttentionRows(0, scores, values, layout, torch.tensor([[True]]))
    >>> rows.weights.tolist(), rows.outputs.tolist()
    ([[[[0.5, 0.5]]]], [[[[2.0]]]])
    >>> rows.with_scores(scores.masked_fill(rows.image, float("-inf"))).outputs.tolist()
    [[[[3.0]]]]
    """

    layer: int
    """Number of the decoder layer."""
    scores: Tensor
    """Scaled products of queries and keys, after softcapping and mask, ``[rows, heads, queries, keys]``; minus infinity for keys
    that a query does not attend to."""
    values: Tensor
    """Values of the keys, ``[rows, key heads, keys, width]``; consecutive heads share a key head."""
    layout: RowLayout
    """What the rows and keys are; its columns are the keys."""
    queries: Tensor
    """Which queries are to be edited, bool ``[rows, queries]``; results at other queries are ignored. The last query is the
    last token of the forward pass."""
    sinks: Tensor | None = None
    """Score of the learned attention sink of each head, ``[heads]``, in families that have one; it has a weight and no value."""
    unmasked: bool = False
    """Whether every query attends to every key, so that no score is minus infinity."""
    new_weights: Tensor | None = None
    new_outputs: Tensor | None = None

    @cached_property
    def image(self) -> Tensor:
        """Which keys are image tokens that a query attends to, bool ``[rows, 1, queries, keys]``."""
        return self.keys(self.layout.image)

    def keys(self, columns: Tensor) -> Tensor:
        """Return which keys are in `columns`, bool ``[rows, keys]``, and attended to, bool ``[rows, 1, queries, keys]``."""
        return columns[:, None, None] if self.unmasked else columns[:, None, None] & self._attended

    @cached_property
    def _attended(self) -> Tensor:
        """Keys that some head of a query attends to, bool ``[rows, 1, queries, keys]``."""
        return self.scores.amax(1, keepdim=True) > -math.inf

    @cached_property
    def weights(self) -> Tensor:
        """Softmax of `scores`, or the weights that an editor set, ``[rows, heads, queries, keys]``."""
        if self.new_weights is not None:
            return self.new_weights
        if self.sinks is None:
            return self.scores.softmax(-1)
        sinks = self.sinks.to(self.scores)[None, :, None, None].expand(*self.scores.shape[:3], 1)
        return torch.cat([self.scores, sinks], dim=-1).softmax(-1)[..., :-1]

    @cached_property
    def outputs(self) -> Tensor:
        """Outputs of the heads, before the output projection, ``[rows, heads, queries, width]``."""
        if self.new_outputs is not None:
            return self.new_outputs
        return _by_key_head(self.weights, self.values.to(self.weights.dtype))

    def with_scores(self, scores: Tensor) -> AttentionRows:
        """Return a copy with other scores; weights and outputs follow from them, and excluded keys stay excluded."""
        scores = scores if self.unmasked else torch.where(self.scores > -math.inf, scores, self.scores)
        return replace(self, scores=scores, unmasked=False, new_weights=None, new_outputs=None)

    def with_weights(self, weights: Tensor) -> AttentionRows:
        """Return a copy with other weights, which need not add to 1; outputs follow from them."""
        return replace(self, new_weights=weights, new_outputs=None)

    def with_outputs(self, outputs: Tensor) -> AttentionRows:
        """Return a copy with other outputs of the heads."""
        return replace(self, new_outputs=outputs)

    def with_queries(self, queries: Tensor) -> AttentionRows:
        """Return a copy in which other queries are to be edited."""
        return replace(self, queries=queries)

    def merged(self, edited: AttentionRows) -> AttentionRows:
        """Return a copy that is `edited` at the queries that are to be edited."""
        chosen = self.queries[:, None, :, None]
        weights, outputs = edited.new_weights, edited.new_outputs
        if weights is not None or self.new_weights is not None:
            weights = torch.where(chosen, edited.weights, self.weights)
        if outputs is not None or self.new_outputs is not None:
            outputs = torch.where(chosen, edited.outputs, self.outputs)
        scores = torch.where(chosen, edited.scores, self.scores)
        return replace(self, scores=scores, new_weights=weights, new_outputs=outputs)


def attention_scores(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, first: int, options: dict[str, Any]
) -> Tensor:
    """Return the scores of the queries from `first` on, ``[rows, heads, queries, keys]``.

    Parameters
    ----------
    module
        The attention module.
    query
        All queries, ``[rows, heads, queries, width]``.
    key
        All keys, ``[rows, key heads, keys, width]``.
    mask
        The mask of attention: bool (True: attended to) or floating (added), ``[rows or 1, heads or 1, queries, keys]``, or None:
        causal.
    first
        Index of the first query.
    options
        Further arguments of the attention function: ``scaling``, ``softcap``, ``is_causal``, ``position_bias``.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = options.get("scaling")
    scores = _by_key_head(query[:, :, first:].to(dtype), key.to(dtype).transpose(2, 3))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (bias := options.get("position_bias")) is not None:
        scores = scores + bias[:, :, first:, : key.shape[2]]
    if mask is None and first == query.shape[2] - 1:
        return scores  # the last query attends to all keys
    if mask is None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return (
            scores.masked_fill(_future(query.shape[2], key.shape[2], first, scores.device), -math.inf)
            if causal
            else scores
        )
    part = mask[:, :, first:, : key.shape[2]]
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, -math.inf)
    # transformers excludes keys by the smallest number of the dtype.
    return (scores + part).masked_fill(part <= torch.finfo(part.dtype).min / 2, -math.inf)


def _by_key_head(x: Tensor, y: Tensor) -> Tensor:
    """Multiply ``[rows, heads, n, m]`` by ``[rows, key heads, m, k]``, whose consecutive heads share a key head."""
    rows, heads, n, m = x.shape
    if heads == y.shape[1]:
        return x @ y
    return (x.reshape(rows, y.shape[1], -1, m) @ y).view(rows, heads, n, y.shape[-1])


def _future(queries: int, keys: int, first: int, device: torch.device) -> Tensor:
    """Return which keys are after a query, bool ``[queries - first, keys]``; the last query is at the last key."""
    positions = torch.arange(keys - queries + first, keys, device=device)
    return torch.arange(keys, device=device) > positions[:, None]
