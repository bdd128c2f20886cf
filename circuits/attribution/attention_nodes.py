"""Attention of the decoder with its queries, keys, values and pattern laid open, each a node that gradients reach.

The model's own layers run; only what they call for attention is another function while a context is open. Queries and
keys are seen as the softmax gets them, positions already applied, and every query head has its own copy of the keys and
values that heads share in grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from circuits.attribution.gradients import configurations
from circuits.execution.prefix_attention import UNKNOWN
from groundscope.core.errors import ModelError
from lvlm.family.specification import resolve
from lvlm.model import Lvlm


@dataclass(frozen=True, eq=False)
class Opened:
    """What one layer's attention was given and made of it in the forward just run."""

    query: Tensor
    """``[P, H, T, d]``, positions applied."""
    shared_key: Tensor
    """As the layer made them, ``[P, KV, T, d]``."""
    shared_value: Tensor
    key: Tensor
    """One a query head, ``[P, H, T, d]``."""
    value: Tensor
    pattern: Tensor | None
    """``[P, H, T, T]``; None where it was not asked for."""
    rule: Rule

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.key.shape[1] // self.shared_key.shape[1]


@dataclass(frozen=True, eq=False)
class Rule:
    """How queries and keys become attention in one layer."""

    scaling: float
    softcap: float | None
    mask: Tensor | None
    """Added to the scores, ``[P or 1, H or 1, T, T]``; None where every key is seen."""

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return scores before the softmax, ``[P, H, T, d]`` and the same -> ``[P, H, T, T]``, of at least float32."""
        found = query @ key.transpose(-1, -2)
        found = (found.float() if found.element_size() < 4 else found) * self.scaling
        if self.softcap is not None:
            found = torch.tanh(found / self.softcap) * self.softcap
        return found if self.mask is None else found + self.mask

    def replaced(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the pattern of other queries or keys."""
        return self.scores(query, key).softmax(-1)


Replace = Callable[[int, Opened], tuple[Tensor, Tensor, Tensor] | None]
"""Shown a layer and what its attention is given; returns queries, keys and values ``[P, H, T, d]`` to use instead."""


class OpenedAttention:
    """The attention function; what it saw of each layer is in `seen`."""

    def __init__(self, model: Lvlm, *, patterns: bool, change: Replace | None = None) -> None:
        path = model.spec.decoder.attention
        self.layers = {id(resolve(one, path, model.spec)): i for i, one in enumerate(model.layers("decoder"))}
        self.patterns, self.change = patterns, change
        self.seen: dict[int, Opened] = {}

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
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is read, ``[P, T, H, d]``, and the pattern where it was asked for."""
        del dropout  # of a model in training, which no run is
        unknown = next((name for name in UNKNOWN if more.get(name) is not None), None)
        if unknown:
            msg = (
                f"{type(module).__name__} gives its attention '{unknown}', which is not known here: it cannot be opened"
            )
            raise ModelError(msg)
        groups = query.shape[1] // key.shape[1]
        factor: float = query.shape[-1] ** -0.5 if scaling is None else scaling
        rule = Rule(factor, more.get("softcap"), _added(attention_mask, module, query, key, more))
        own = [x.repeat_interleave(groups, dim=1) if groups > 1 else x.view_as(x) for x in (key, value)]
        q, k, v = query, *own
        layer = self.layers.get(id(module))
        given = Opened(q, key, value, k, v, None, rule)
        if layer is not None and self.change is not None and (new := self.change(layer, given)) is not None:
            q, k, v = new
        pattern = None
        if self.patterns or rule.softcap is not None:
            pattern = rule.replaced(q, k).to(query.dtype)
            read = pattern @ v
        else:
            mask = None if rule.mask is None else rule.mask.to(query.dtype)
            read = scaled_dot_product_attention(q, k, v, mask, scale=rule.scaling)
        if layer is not None:
            self.seen[layer] = Opened(q, key, value, k, v, pattern, rule)
        return read.transpose(1, 2).contiguous(), pattern


@contextmanager
def opened(model: Lvlm, *, patterns: bool = False, change: Replace | None = None) -> Iterator[OpenedAttention]:
    """Lay the decoder's attention open while the context lasts; afterwards, after an error too, it is as it was."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = OpenedAttention(model, patterns=patterns, change=change)
    table: Any = ALL_ATTENTION_FUNCTIONS
    before = {id(c): (c, c._attn_implementation) for c in configurations(model).values()}
    with ExitStack() as stack:
        # Under this name, so that masks are made as for attention computed step by step.
        stack.callback(_put_back, table, table.get("eager"))
        table["eager"] = function
        for config, name in before.values():
            stack.callback(setattr, config, "_attn_implementation", name)
            config._attn_implementation = "eager"
        yield function


def check_opened(model: Lvlm) -> None:
    """Raise `ModelError` where the decoder's attention cannot be laid open, without running it."""
    spec = model.spec.decoder
    cross = [i for i in range(model.n_layers) if model.attends("decoder", i, cross=True)]
    why = ""
    if model.encoder_decoder:
        why = "an encoder reads its prompt"
    elif cross:
        why = f"its decoder reads the image by cross-attention (layer {cross[0]} and others), not as tokens of its own"
    elif spec.attention_post_norm:
        why = "its layers norm the residual stream itself, so that it is no sum of what layers add"
    elif not all(model.attends("decoder", i, cross=False) for i in range(model.n_layers)):
        why = "some of its decoder's layers have no attention"
    if why:
        msg = (
            f"{model.name} (family '{model.spec.model_type}'): queries, keys and values of heads cannot be told apart here: "
            f"{why}; attribution.heads, attribution.nodes and circuits.patch_paths do not need them"
        )
        raise ModelError(msg)


def _put_back(table: Any, before: Any) -> None:
    if before is None:
        table.pop("eager", None)
    else:
        table["eager"] = before


def _added(mask: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, more: Any) -> Tensor | None:
    """Return what a layer's mask adds to scores; a missing one is causal where the layer is."""
    size, length = query.shape[2], key.shape[2]
    if mask is None:
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or size == 1:
            return None
        at = torch.arange(length - size, length, device=query.device)[:, None]
        to = torch.arange(length, device=query.device)[None]
        window = more.get("sliding_window")
        seen = to <= at
        return _as_added((seen & (to > at - window) if window else seen)[None, None], query)
    return _as_added(mask, query) if mask.dtype == torch.bool else mask[..., :length]


def _as_added(seen: Tensor, query: Tensor) -> Tensor:
    empty = torch.zeros(seen.shape, device=seen.device, dtype=query.dtype)
    return empty.masked_fill_(~seen, torch.finfo(query.dtype).min)
