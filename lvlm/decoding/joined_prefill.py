"""Run a prompt and branches of text in one forward pass.

A branch without an image is short, and a forward pass over few tokens reads all weights as one over many does. So the tokens of
the branch follow those of the prompt in one sequence, with positions of their own, and attention is computed for each part alone:
no token attends to another part, and edits of attention see each part as they see a separate pass. Norms and linear layers act on
each token, so the results are those of separate passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lvlm.access.replaced_attention import add_replacement, remove_replacement, usual_name
from lvlm.access.shared_vision_run import share_vision_runs
from lvlm.active_interventions import without_marked_hooks
from lvlm.decoding.attention_edits import (
    attention_configs,
    attention_function,
    check_attention_edits,
    usual_attention,
    without_attention_edits,
)
from lvlm.decoding.cache import new_cache
from lvlm.decoding.cache_check import check_prompts, rounding_of
from lvlm.decoding.row_layout import RowLayout
from lvlm.decoding.rule import Branch, Prompts
from lvlm.family.module_detection import text_config
from lvlm.image_tokens import image_in_sequence, image_tokens, reads_both_ways

if TYPE_CHECKING:
    from lvlm.model import Lvlm

_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""Inputs of prompts without an image."""


@dataclass(frozen=True, eq=False)
class Part:
    """Prompts of equal shape that are a part of the sequence; the first part may have images, the others have text only."""

    prompts: Prompts
    layout: RowLayout


@dataclass(frozen=True, eq=False)
class Prefill:
    """What a separate forward pass over a part would return."""

    logits: Tensor
    """Logits at its last token, ``[rows, V]``."""
    cache: Any
    """Keys and values of its tokens; None if they are not kept."""
    length: int
    """Number of its tokens, from position 0."""


def joinable(model: Lvlm, prompts: Sequence[tuple[int, Prompts]], branch: Branch) -> bool:
    """Whether a branch can run in the forward pass of the prompts, by its own form; see `joins_prefills` for the model."""
    if len(prompts) != 1 or len(branch.prompts) != 1 or branch.context is not nullcontext:
        return False
    (group,) = branch.prompts
    return group.rows == prompts[0][1].rows and set(group.inputs) <= _TEXT_INPUTS and not _has_hooks(model)


def joins_prefills(model: Lvlm) -> bool:
    """Whether one forward pass over several parts gives the logits of separate ones; measured once per model.

    False for attention other than ``sdpa``, for windows, for positions of several axes, and for models that read a prompt in both
    directions.
    """
    if model.encoder_decoder or reads_both_ways(model) or not {"position_ids", "logits_to_keep"} <= model.accepts:
        return False
    return bool(model.remember(("joined prefills", model.attention, str(model.dtype)), lambda: _measure(model)))


def joined_prefill(model: Lvlm, parts: Sequence[Part], *, keeps_cache: bool) -> list[Prefill]:
    """Run the parts of one sequence; each has the rows of the others, in their order."""
    inputs = dict(parts[0].prompts.inputs)
    lengths = [part.layout.prompt for part in parts]
    for name in _TEXT_INPUTS & set(inputs):
        inputs[name] = torch.cat([_of_part(part, name) for part in parts], dim=1)
    device = inputs["input_ids"].device
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    inputs["position_ids"] = positions.expand(len(inputs["input_ids"]), -1)
    ends = torch.tensor(lengths, device=device).cumsum(0)
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": ends - 1}
    if keeps_cache:
        options |= {"use_cache": True, "past_key_values": new_cache()}
    with share_vision_runs(model, parts[0].prompts.images), _by_part(model, [part.layout for part in parts]):
        logits = model.hf(**inputs, **options).logits
    caches = _split(options["past_key_values"], lengths) if keeps_cache else [None] * len(parts)
    return [Prefill(logits[:, i], cache, n) for i, (cache, n) in enumerate(zip(caches, lengths, strict=True))]


def _of_part(part: Part, name: str) -> Tensor:
    own_values, ids = part.prompts.inputs.get(name), part.prompts.inputs["input_ids"]
    if own_values is not None:
        return own_values.to(ids.device)
    return torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)


def _split(cache: Any, lengths: Sequence[int]) -> list[Any]:
    """Return the cache of each part."""
    caches = [new_cache() for _ in lengths]
    for number, layer in enumerate(cache.layers):
        keys, values = (x.split(list(lengths), dim=2) for x in (layer.keys, layer.values))
        for part, k, v in zip(caches, keys, values, strict=True):
            part.update(k, v, number)
    return caches


@contextmanager
def _by_part(model: Lvlm, layouts: Sequence[RowLayout]) -> Iterator[None]:
    """Let each part of a sequence attend to itself only, under its own layout, while the context is open."""
    from transformers import AttentionInterface, AttentionMaskInterface

    configs = attention_configs(model)
    before = [config._attn_implementation for config in configs]
    name = f"groundscope_parts_{id(model.hf):x}"
    lengths = [layout.prompt for layout in layouts]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        inner = attention_function(module, str(before[0]))
        parts = zip(layouts, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        outputs = []
        for layout, q, k, v in parts:
            with model.with_row_layout(layout):
                outputs.append(inner(module, q, k, v, None, **options)[0])
        return torch.cat(outputs, dim=1), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *_args, **_options: None)
    add_replacement(name, _Usual(usual_name(before[0]) or ""))
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        remove_replacement(name)
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


@dataclass
class _Usual:
    usual: str


def _has_hooks(model: Lvlm) -> bool:
    """Whether modules that see the sequence have hooks, which may act on its positions; those of transformers do not."""
    tower = model.tower
    others = {model.hf, *(() if tower is None else tower.modules())}
    tables = (t for m in model.hf.modules() if m not in others for t in (m._forward_hooks, m._forward_pre_hooks) if t)
    return any(not str(getattr(h, "__module__", "")).startswith("transformers.") for t in tables for h in t.values())


@torch.no_grad()
def _measure(model: Lvlm) -> bool:
    text = text_config(model.hf.config)
    if usual_attention(model) != "sdpa" or not image_in_sequence(model):
        return False
    windows = any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if windows and getattr(text, "use_sliding_window", True):
        return False
    with model.with_row_layout(None), without_attention_edits(model), without_marked_hooks(model.hf):
        try:
            check_attention_edits(model)
            main, other = check_prompts(model)
            ids = other.inputs["input_ids"][~image_tokens(model, other.inputs)][None]
            blind = Prompts(main.rows, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            separate = [model.logits(group.inputs) for group in (main, blind)]
            parts = [Part(group, _plain_layout(model, group)) for group in (main, blind)]
            joined = joined_prefill(model, parts, keeps_cache=True)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            return False
        pairs = zip(separate, joined, strict=True)
        difference = max(float((a.log_softmax(-1) - b.logits.log_softmax(-1)).abs().max()) for a, b in pairs)
    return difference <= 2 * rounding_of(model)


def _plain_layout(model: Lvlm, prompts: Prompts) -> RowLayout:
    valid = torch.ones_like(prompts.inputs["input_ids"], dtype=torch.bool)
    return RowLayout(torch.zeros(len(valid), dtype=torch.long, device=valid.device), ~valid, valid, valid.shape[1])
