"""Which tokens of a forward pass are image tokens, by family; each function returns bool ``[rows, positions]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groundscope.core.errors import DataError
from groundscope.core.text import format_count
from lvlm.encoding.tiled import anyres_layout
from lvlm.interfaces import Model


def by_token_id(model: Model, inputs: Mapping[str, Any]) -> Tensor:
    """Most families: tokens with the id of the image token."""
    return inputs["input_ids"] == model.content_id


def without_class_token(model: Model, inputs: Mapping[str, Any]) -> Tensor:
    """LLaVA: with the strategy ``full``, the first token of each image is the class token, which is not a part of the image."""
    candidates = by_token_id(model, inputs)
    class_tokens = _class_tokens(model)
    if not class_tokens or not bool(candidates.any()):
        return candidates
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or not pixels.shape[0]:
        msg = f"pixel_values are needed to find the class tokens of {model.name}'s images; pass them together with input_ids"
        raise DataError(msg)
    images = int(pixels.shape[0])
    each, remainder = divmod(int(candidates.sum()), images)
    if remainder or each <= class_tokens:
        msg = f"{int(candidates.sum())} image tokens do not fit {format_count(images, 'image')} of equal size; check input_ids"
        raise DataError(msg)
    return _select(candidates, [[False] * class_tokens + [True] * (each - class_tokens)] * images)


def without_row_ends(model: Model, inputs: Mapping[str, Any]) -> Tensor:
    """LLaVA-NeXT, LLaVA-OneVision: each row of the joined tiles ends with a token that is not a part of the image."""
    candidates = by_token_id(model, inputs)
    if not bool(candidates.any()):
        return candidates
    sizes = inputs.get("image_sizes")
    if sizes is None:
        msg = f"image_sizes are needed to find the row ends of {model.name}'s images; pass them together with input_ids"
        raise DataError(msg)
    each = [(int(height), int(width)) for height, width in sizes]
    counts = inputs.get("batch_num_images")
    several = [False] * len(each) if counts is None else [int(n) > 1 for n in counts for _ in range(int(n))]
    layouts = [anyres_layout(model, size, tiles=not shared) for size, shared in zip(each, several, strict=True)]
    return _select(candidates, [layout.pattern for layout in layouts])


def by_position_mask(model: Model, inputs: Mapping[str, Any]) -> Tensor:
    """Kosmos-2: the tokens of its position mask, because their ids are running numbers."""
    mask = inputs.get("image_embeds_position_mask")
    if mask is None:
        if bool((inputs["input_ids"] == model.content_id).any()):
            msg = (
                f"image_embeds_position_mask is needed to find the image tokens of {model.name}; pass it together with "
                "input_ids"
            )
            raise DataError(msg)
        return torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    return mask.bool()


def _class_tokens(model: Model) -> int:
    """Return the number of class tokens of an image in the decoder's sequence."""
    strategy = getattr(model.hf.config, "vision_feature_select_strategy", "default")
    return (model.spec.vision_prefix or 0) if strategy == "full" else 0


def _select(candidates: Tensor, patterns: Sequence[Sequence[bool]]) -> Tensor:
    """Return the candidates, in order, that the patterns of the images select."""
    pattern = [selected for image in patterns for selected in image]
    if len(pattern) != int(candidates.sum()):
        msg = (
            f"{int(candidates.sum())} image tokens do not fit {format_count(len(patterns), 'image')}, which become "
            f"{len(pattern)} tokens; check image_sizes and input_ids"
        )
        raise DataError(msg)
    mask = torch.zeros_like(candidates)
    mask[candidates] = torch.tensor(pattern, dtype=torch.bool, device=candidates.device)
    return mask
