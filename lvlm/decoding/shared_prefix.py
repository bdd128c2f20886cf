"""Logits after several prompts about one image; their common prefix, which contains the image, runs once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groundscope.core.errors import DataError
from lvlm.access.decoder_module import decoder_of
from lvlm.active_interventions import mark_observer, without_marked_hooks
from lvlm.decoding.attention_edits import without_attention_edits
from lvlm.decoding.cache import new_cache
from lvlm.decoding.cache_check import check_prompts, rounding_of
from lvlm.decoding.loop import PADDING, merges_caches
from lvlm.image_tokens import image_in_sequence, image_tokens

if TYPE_CHECKING:
    from lvlm.model import Lvlm

_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Inputs with one value for each token."""
_QUESTIONS = ("Is there a dog?", "Is there a cat in the image?")
"""Questions with the same beginning, with which sharing is measured."""


@torch.no_grad()
def logits_after_each(model: Lvlm, prompts: Sequence[Mapping[str, Tensor]], *, share: bool = True) -> Tensor:
    """Return the logits after each of several prompts about the same images, ``[n, V]``.

    Parameters
    ----------
    model
        The model.
    prompts
        Inputs of one row each, on the model's device, that differ in their tokens only; none is padded.
    share
        Run the tokens that all prompts begin with once, if the model's cache allows it (`shares_prefixes`) and the first that
        differs comes after the image. False for models with interventions whose positions depend on the whole prompt.

    Raises
    ------
    DataError
        If there are no prompts.
    """
    if not prompts:
        msg = "no prompts to read; give at least one"
        raise DataError(msg)
    length = _common_length(model, prompts)
    if len(prompts) > 1 and share and length and shares_prefixes(model):
        return _shared(model, prompts, length)
    return torch.cat([model.forward(inputs)[:, -1] for inputs in prompts])


def shares_prefixes(model: Lvlm) -> bool:
    """Whether prompts that continue one cached prefix have the logits of full forward passes; measured once per model.

    False for models that read a prompt in both directions, and for those whose caches cannot be merged.
    """
    if not merges_caches(model):
        return False
    return bool(model.remember(("shared prefixes", model.attention, str(model.dtype)), lambda: _measure(model)))


@torch.no_grad()
def _measure(model: Lvlm) -> bool:
    prompts = [group.inputs for group in check_prompts(model, _QUESTIONS)]
    length = _common_length(model, prompts)
    if not length:
        return False
    with model.with_row_layout(None), without_attention_edits(model), without_marked_hooks(model.hf):
        try:
            shared = _shared(model, prompts, length)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            return False
        full = torch.cat([model.forward(inputs)[:, -1] for inputs in prompts])
    difference = (shared.log_softmax(-1) - full.log_softmax(-1)).abs().amax().item()
    return difference <= len(prompts) * rounding_of(model)


def _common_length(model: Lvlm, prompts: Sequence[Mapping[str, Tensor]]) -> int:
    """Return how many tokens all prompts begin with, at least one less than the shortest; 0 if they differ within the image."""
    if model.encoder_decoder:
        return 0
    rows = [inputs["input_ids"][0].tolist() for inputs in prompts]
    shortest = min(len(row) for row in rows) - 1
    length = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    if not image_in_sequence(model):
        return 0
    image = [
        int(marks.nonzero()[-1]) if marks.any() else -1
        for marks in (image_tokens(model, inputs)[0] for inputs in prompts)
    ]
    # Positions continue from a text token: those of image tokens may have several axes.
    return length if length > max(image) + 1 else 0


def _shared(model: Lvlm, prompts: Sequence[Mapping[str, Tensor]], length: int) -> Tensor:
    """Run the first `length` tokens once, then the others of all prompts as one batch, padded at their ends."""
    rows = [inputs["input_ids"][0, length:] for inputs in prompts]
    cache: Any = new_cache()
    prefix = {name: x[:, :length] if name in _PER_TOKEN else x for name, x in prompts[0].items()}
    positions: list[Tensor] = []

    @mark_observer
    def read_positions(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("position_ids"), Tensor):
            positions.append(kwargs["position_ids"][..., -1:])

    with ExitStack() as stack:
        stack.callback(decoder_of(model).register_forward_pre_hook(read_positions, with_kwargs=True).remove)
        model.forward(prefix, use_cache=True, past_key_values=cache)
    cache.batch_repeat_interleave(len(rows))
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=PADDING) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    valid = torch.arange(width, device=ids.device) < lengths[:, None]
    last = positions[-1] if positions else torch.full((1, 1), length - 1, device=ids.device)
    last = last.reshape(-1, 1, 1)  # [axes, 1, 1]
    position = (last + 1 + torch.arange(width, device=ids.device)).expand(-1, len(rows), -1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.cat([valid.new_ones(len(rows), length), valid], dim=1).long(),
        "position_ids": position if len(position) > 1 else position[0],
    }
    logits = model.forward(inputs, keep=width, use_cache=True, past_key_values=cache)
    return logits[torch.arange(len(rows), device=ids.device), lengths - 1]
