"""Attention of many short suffixes to one shared prefix, without a copy of the prefix per suffix.

The model's own layers run; only their attention function is replaced while a context is open. It is registered in
`transformers.AttentionInterface`'s table under a unique name, and removed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from groundscope.core.errors import PatchError
from lvlm.access.eager_attention import attention
from lvlm.model import Lvlm

SCORES = 2**23
"""Bytes of attention scores per block: small enough for a processor's cache."""

UNKNOWN = ("position_bias", "s_aux")
"""Attention arguments of some families that this package's attention functions do not support."""


class NotShared(Exception):  # internal: the caller falls back to full forward passes
    """A model's patches cannot run as suffixes of a shared prefix; the message states the reason."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the prefix in one layer, shared by n suffixes of each of P examples."""

    keys: Tensor
    """``[P, key heads, T', head_dim]``: T' positions before the suffix; for cross-attention, all positions."""
    values: Tensor
    mask: Tensor | None
    """Rows of the layer's mask for the S suffix positions, ``[P or 1, heads or 1, S, T]``: bool (True is visible) or
    added to the scores; None if the layer receives no mask."""
    cross: bool
    """Whether the layer attends to `keys` only (cross-attention)."""


class SharedAttention:
    """The replacement attention function; `prefix` is set before each layer."""

    def __init__(self) -> None:
        self.prefix: Prefix | None = None
        self.calls = 0
        """Number of calls since the counter was reset to 0."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """Return the attention output of R = P n rows, ``[R, S, heads, head_dim]``; ignores the mask of the call."""
        del attention_mask
        if self.prefix is None:
            msg = f"{type(module).__name__} calls its attention outside of a decoder layer"
            raise NotShared(msg)
        if dropout:
            msg = f"{type(module).__name__} applies attention dropout {dropout:g}: set it to 0, or call model.hf.eval()"
            raise PatchError(msg)
        unknown = next((k for k in UNKNOWN if more.get(k) is not None), None)
        if unknown:
            msg = f"{type(module).__name__} passes '{unknown}' to its attention, which shared prefixes do not support"
            raise NotShared(msg)
        self.calls += 1
        factor: float = query.shape[-1] ** -0.5 if scaling is None else scaling
        before, own = _masks(self.prefix, module, query, more)
        rows = query.shape[0] // self.prefix.keys.shape[0]
        each = 4 * self.prefix.keys.shape[0] * query.shape[1] * query.shape[2] * self.prefix.keys.shape[2]
        step = max(1, SCORES // max(each, 1))
        x = query.new_empty(len(query), query.shape[2], query.shape[1], value.shape[-1])  # [R, S, H, d]
        by_example = x.unflatten(0, (-1, rows))
        q, k, v = (
            t.unflatten(0, (-1, rows)) for t in ((query, query, query) if self.prefix.cross else (query, key, value))
        )
        for at in range(0, rows, step):
            part = slice(at, at + step)
            suffix = None if self.prefix.cross else (k[:, part], v[:, part])
            read = _attend(q[:, part], suffix, self.prefix, before, own, factor, more.get("softcap"))
            by_example[:, part] = read.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
        return x, None


def _attend(
    query: Tensor,
    suffix: tuple[Tensor, Tensor] | None,
    prefix: Prefix,
    before: Tensor | None,
    own: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Return the output of queries ``[P, n, H, S, d]``, one softmax over prefix and suffix, ``[P, n, KV, G, S, d]``."""
    examples, rows, heads, size, width = query.shape
    kv = prefix.keys.shape[1]
    if suffix is not None and not prefix.keys.shape[2] and softcap is None:
        return _attend_within(query, *suffix, own, scaling)
    q = query.unflatten(2, (kv, heads // kv))  # [P, n, KV, G, S, d]
    # All rows of an example are queries of one batched product with its prefix.
    flat = q.permute(0, 2, 1, 3, 4, 5).reshape(examples, kv, -1, width)
    scores = flat @ prefix.keys.transpose(-1, -2)  # [P, KV, n G S, T']
    length = scores.shape[-1]
    scores = _scaled(scores.float(), scaling, softcap).view(examples, kv, rows, heads // kv, size, length)
    if before is not None:
        scores += _by_heads(before, kv)
    top = scores.amax(-1, keepdim=True) if length else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    suffix_scores = None
    if suffix is not None:
        suffix_scores = q.flatten(3, 4) @ suffix[0].transpose(-1, -2)  # [P, n, KV, G S, S]
        suffix_scores = _scaled(suffix_scores.float(), scaling, softcap).transpose(1, 2).unflatten(3, (-1, size))
        if own is not None:
            suffix_scores = suffix_scores + _by_heads(own, kv)
        top = torch.maximum(top, suffix_scores.amax(-1, keepdim=True))
        suffix_scores = suffix_scores.sub(top).exp_()
    scores = scores.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True)
    dtype = prefix.values.dtype
    read = scores.view(examples, kv, flat.shape[2], length).to(dtype) @ prefix.values
    read = read.view(examples, kv, rows, heads // kv, size, read.shape[-1])
    if suffix_scores is not None and suffix is not None:
        total = total + suffix_scores.sum(-1, keepdim=True)
        shares = suffix_scores.transpose(1, 2).flatten(3, 4).to(dtype)  # [P, n, KV, G S, S]
        read = read + (shares @ suffix[1]).unflatten(3, (-1, size)).transpose(1, 2)
    return (read / total).to(query.dtype).transpose(1, 2)


def _attend_within(query: Tensor, keys: Tensor, values: Tensor, own: Tensor | None, scaling: float) -> Tensor:
    """Return the same without a prefix, by torch's attention, ``[P, n, KV, G, S, d]``."""
    examples, rows, heads, size, _ = query.shape
    if own is not None:  # [P or 1, H or 1, S, S]
        own = own.to(query.dtype)[:, None].expand(examples, rows, -1, -1, -1).flatten(0, 1)
    read = scaled_dot_product_attention(
        query.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        own,
        scale=scaling,
        enable_gqa=heads > keys.shape[2],
    )
    return read.view(examples, rows, keys.shape[2], -1, size, read.shape[-1])


def _scaled(scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
    scores = scores.mul_(scaling)
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _by_heads(mask: Tensor, kv: int) -> Tensor:
    """Return a mask ``[P or 1, H or 1, S, keys]`` in the layout of scores ``[P, KV, n, G, S, keys]``."""
    return mask[:, :, None, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv, -1))[:, :, None]


def _masks(prefix: Prefix, module: nn.Module, query: Tensor, more: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the terms to add to the scores of the prefix and of the suffix; None for no term."""
    length, size = prefix.keys.shape[2], query.shape[2]
    mask = prefix.mask
    if mask is None:
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if prefix.cross or not causal:
            return None, None
        mask = _causal(length, size, more.get("sliding_window"), query.device)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    mask = mask.float()
    if prefix.cross:
        return mask, None
    parts = mask[..., :length], mask[..., length:]
    before, own = (part if bool((part != 0).any()) else None for part in parts)
    return before, own


def _causal(length: int, size: int, window: int | None, device: torch.device) -> Tensor:
    at = torch.arange(length, length + size, device=device)[:, None]
    to = torch.arange(length + size, device=device)[None]
    visible = to <= at
    return (visible & (to > at - window) if window else visible)[None, None]


@contextmanager
def shared_attention(model: Lvlm) -> Iterator[SharedAttention]:
    """Compute a model's attention by a `SharedAttention` while open; restore it afterwards, also after an error."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = SharedAttention()
    name = f"shared_prefix_{id(function):x}"
    with ExitStack() as stack:
        table: Any = ALL_ATTENTION_FUNCTIONS
        table[name] = function
        stack.callback(table.pop, name)
        stack.enter_context(attention(model, name))
        yield function


def closed(mask: Tensor | None, start: int) -> int:
    """Return the last position s <= `start` such that no position before s attends to s or later."""
    if mask is None or start == 0:
        return start
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible.flatten(0, 1).any(0)  # [T, T]
    length = visible.shape[1]
    number = torch.arange(length, device=visible.device)
    reach = torch.where(visible, number, -1).amax(1).cummax(0).values.tolist()
    return next((s for s in range(start, 0, -1) if reach[s - 1] < s), 0)
