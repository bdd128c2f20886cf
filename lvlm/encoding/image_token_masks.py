"""Which tokens of a forward stand for an image, by family: each function returns bool ``[rows, positions]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groundscope.core.errors import DataError
from lvlm.encoding.tiled import anyres_layout

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def by_id(model: Lvlm, inputs: Mapping[str, Any]) -> Tensor:
    """Most families: a token with the id of an image token."""
    return inputs["input_ids"] == model.content_id


def without_class_token(model: Lvlm, inputs: Mapping[str, Any]) -> Tensor:
    """LLaVA: with the strategy ``full`` the class token of each image is a token too, and no part of the image."""
    marked = by_id(model, inputs)
    kept = class_tokens(model)
    if not kept or not bool(marked.any()):
        return marked
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or not pixels.shape[0]:
        msg = f"the class tokens of {model.name}'s images are found by pixel_values: pass them together with input_ids"
        raise DataError(msg)
    each, rest = divmod(int(marked.sum()), int(pixels.shape[0]))
    if rest or each <= kept:
        msg = f"{int(marked.sum())} image tokens do not fit {pixels.shape[0]} images of equal size: check input_ids"
        raise DataError(msg)
    return _cut(marked, [[False] * kept + [True] * (each - kept)] * int(pixels.shape[0]))


def without_row_ends(model: Lvlm, inputs: Mapping[str, Any]) -> Tensor:
    """LLaVA-NeXT and OneVision: each row of the joined tiles ends with a token that is no part of the image."""
    marked = by_id(model, inputs)
    if not bool(marked.any()):
        return marked
    sizes = inputs.get("image_sizes")
    if sizes is None:
        msg = f"the row ends of {model.name}'s images are found by image_sizes: pass them together with input_ids"
        raise DataError(msg)
    each = [(int(height), int(width)) for height, width in sizes]
    counts = inputs.get("batch_num_images")
    several = [False] * len(each) if counts is None else [int(n) > 1 for n in counts for _ in range(int(n))]
    layouts = [anyres_layout(model, size, tiles=not one) for size, one in zip(each, several, strict=True)]
    return _cut(marked, [layout.pattern for layout in layouts])


def by_position_mask(model: Lvlm, inputs: Mapping[str, Any]) -> Tensor:
    """Kosmos-2: the tokens of its own position mask, whose ids are running numbers; none in a row without an image."""
    mask = inputs.get("image_embeds_position_mask")
    if mask is None:
        if bool((inputs["input_ids"] == model.content_id).any()):
            msg = f"the image tokens of {model.name} are found by image_embeds_position_mask: pass it together with input_ids"
            raise DataError(msg)
        return torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    return mask.bool()


def class_tokens(model: Lvlm) -> int:
    """Return how many tokens before the patches of an image the decoder reads too."""
    strategy = getattr(model.hf.config, "vision_feature_select_strategy", "default")
    return (model.spec.vision_prefix or 0) if strategy == "full" else 0


def _cut(marked: Tensor, patterns: Sequence[Sequence[bool]]) -> Tensor:
    """Keep of the marked tokens, in order, those that the patterns of the images say."""
    pattern = [keep for one in patterns for keep in one]
    if len(pattern) != int(marked.sum()):
        msg = (
            f"{int(marked.sum())} image tokens do not fit {len(patterns)} images, which become {len(pattern)}: "
            "check image_sizes and input_ids"
        )
        raise DataError(msg)
    kept = torch.zeros_like(marked)
    kept[marked] = torch.tensor(pattern, dtype=torch.bool, device=marked.device)
    return kept
