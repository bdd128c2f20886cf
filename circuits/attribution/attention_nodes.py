"""Decoder attention with queries, keys, values and pattern exposed, each as a node that gradients reach.

The model's own layers run; only their attention function is replaced while a context is open. Queries and keys are
recorded as the softmax receives them, after positional encoding, and in grouped-query attention every query head gets
its own copy of the shared keys and values.
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
class AttentionRecord:
    """Inputs and pattern of one layer's attention in one forward pass."""

    query: Tensor
    """``[P, H, T, d]``, after positional encoding."""
    shared_key: Tensor
    """As the layer computes them, ``[P, KV, T, d]``."""
    shared_value: Tensor
    key: Tensor
    """One copy per query head, ``[P, H, T, d]``."""
    value: Tensor
    pattern: Tensor | None
    """``[P, H, T, T]``; None unless requested."""
    rule: Rule

    @property
    def groups(self) -> int:
        """Number of query heads that share a key head."""
        return self.key.shape[1] // self.shared_key.shape[1]


@dataclass(frozen=True, eq=False)
class Rule:
    """How one layer computes attention from queries and keys."""

    scaling: float
    softcap: float | None
    mask: Tensor | None
    """Added to the scores, ``[P or 1, H or 1, T, T]``; None if every key is visible."""

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return scores before the softmax: two ``[P, H, T, d]`` -> ``[P, H, T, T]``, in at least float32."""
        scores = query @ key.transpose(-1, -2)
        scores = (scores.float() if scores.element_size() < 4 else scores) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores if self.mask is None else scores + self.mask

    def pattern_of(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the attention pattern of other queries or keys."""
        return self.scores(query, key).softmax(-1)


ReplaceInputs = Callable[[int, AttentionRecord], tuple[Tensor, Tensor, Tensor] | None]
"""Called with a layer and its attention inputs; returns replacement queries, keys and values ``[P, H, T, d]``, or None."""


class ExposedAttention:
    """The replacement attention function; `records` has the record of each layer."""

    def __init__(self, model: Lvlm, *, patterns: bool, change: ReplaceInputs | None = None) -> None:
        path = model.spec.decoder.attention
        self.layers = {id(resolve(block, path, model.spec)): i for i, block in enumerate(model.layers("decoder"))}
        self.patterns, self.change = patterns, change
        self.records: dict[int, AttentionRecord] = {}

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
        """Return the attention output, ``[P, T, H, d]``, and the pattern if requested."""
        del dropout  # 0 in evaluation mode
        unknown = next((name for name in UNKNOWN if more.get(name) is not None), None)
        if unknown:
            msg = f"{type(module).__name__} passes the unsupported argument '{unknown}' to its attention; use attribution.heads"
            raise ModelError(msg)
        groups = query.shape[1] // key.shape[1]
        factor: float = query.shape[-1] ** -0.5 if scaling is None else scaling
        rule = Rule(factor, more.get("softcap"), _added(attention_mask, module, query, key, more))
        own = [x.repeat_interleave(groups, dim=1) if groups > 1 else x.view_as(x) for x in (key, value)]
        q, k, v = query, *own
        layer = self.layers.get(id(module))
        record = AttentionRecord(q, key, value, k, v, None, rule)
        if layer is not None and self.change is not None and (new := self.change(layer, record)) is not None:
            q, k, v = new
        pattern = None
        if self.patterns or rule.softcap is not None:
            pattern = rule.pattern_of(q, k).to(query.dtype)
            read = pattern @ v
        else:
            mask = None if rule.mask is None else rule.mask.to(query.dtype)
            read = scaled_dot_product_attention(q, k, v, mask, scale=rule.scaling)
        if layer is not None:
            self.records[layer] = AttentionRecord(q, key, value, k, v, pattern, rule)
        return read.transpose(1, 2).contiguous(), pattern


@contextmanager
def expose_attention(
    model: Lvlm, *, patterns: bool = False, change: ReplaceInputs | None = None
) -> Iterator[ExposedAttention]:
    """Expose the decoder's attention while the context is open; restore it afterwards, also after an error."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ExposedAttention(model, patterns=patterns, change=change)
    table: Any = ALL_ATTENTION_FUNCTIONS
    before = {id(c): (c, c._attn_implementation) for c in configurations(model).values()}
    with ExitStack() as stack:
        # Registered as "eager" so that the model builds the same masks as for eager attention.
        stack.callback(_put_back, table, table.get("eager"))
        table["eager"] = function
        for config, name in before.values():
            stack.callback(setattr, config, "_attn_implementation", name)
            config._attn_implementation = "eager"
        yield function


def check_exposable(model: Lvlm) -> None:
    """Raise `ModelError` if the decoder's attention cannot be exposed; runs no forward pass."""
    spec = model.spec.decoder
    cross = [i for i in range(model.n_layers) if model.attends("decoder", i, cross=True)]
    why = ""
    if model.encoder_decoder:
        why = "an encoder reads the prompt"
    elif cross:
        why = f"its decoder reads the image by cross-attention (layer {cross[0]} and others), not as tokens of its sequence"
    elif spec.attention_post_norm:
        why = "its layers normalize the residual stream itself, so the stream is not a sum of layer outputs"
    elif not all(model.attends("decoder", i, cross=False) for i in range(model.n_layers)):
        why = "some of its decoder's layers have no attention"
    if why:
        msg = (
            f"{model.name} (family '{model.spec.model_type}'): cannot separate the queries, keys and values of its heads: "
            f"{why}; use attribution.heads, attribution.nodes or circuits.patch_paths"
        )
        raise ModelError(msg)


def _put_back(table: Any, before: Any) -> None:
    if before is None:
        table.pop("eager", None)
    else:
        table["eager"] = before


def _added(mask: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, more: Any) -> Tensor | None:
    """Return the term that a layer's mask adds to the scores; without a mask, a causal one if the layer is causal."""
    size, length = query.shape[2], key.shape[2]
    if mask is None:
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or size == 1:
            return None
        at = torch.arange(length - size, length, device=query.device)[:, None]
        to = torch.arange(length, device=query.device)[None]
        window = more.get("sliding_window")
        visible = to <= at
        return _as_added((visible & (to > at - window) if window else visible)[None, None], query)
    return _as_added(mask, query) if mask.dtype == torch.bool else mask[..., :length]


def _as_added(visible: Tensor, query: Tensor) -> Tensor:
    empty = torch.zeros(visible.shape, device=visible.device, dtype=query.dtype)
    return empty.masked_fill_(~visible, torch.finfo(query.dtype).min)
