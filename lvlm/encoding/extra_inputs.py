"""Inputs that a family's model wants beside tokens and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.encoding.encoded_image import Look

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def question_for_queries(model: Lvlm, ids: list[int], looks: Sequence[Look], text: str) -> dict[str, Tensor]:
    """InstructBLIP: its Q-Former reads the question too, once for each image."""
    del ids
    if "qformer_input_ids" not in model.accepts:
        return {}
    tokenizer = getattr(model.processor, "qformer_tokenizer", None)
    if tokenizer is None:
        msg = f"{model.name} has a Q-Former that reads the question, but its processor has no qformer_tokenizer"
        raise ModelError(msg)
    read = torch.tensor([tokenizer(text)["input_ids"]] * len(looks))
    return {"qformer_input_ids": read, "qformer_attention_mask": torch.ones_like(read)}


def image_mask(model: Lvlm, ids: list[int], looks: Sequence[Look], text: str) -> dict[str, Tensor]:
    """Kosmos-2: a mask says where the image stands; the tokens there bear running numbers."""
    del text
    if len(looks) != 1:
        msg = f"{model.name} takes one image for a prompt, not {len(looks)}"
        raise ModelError(msg)
    count = looks[0].sequence["projector"]
    first = ids.index(model.content_id) + 1
    unknown = model.processor.tokenizer.unk_token_id or 0
    numbered = [*ids[:first], *range(unknown + 1, unknown + 1 + count), *ids[first + count :]]
    mask = [int(first <= i < first + count) for i in range(len(ids))]
    return {"input_ids": torch.tensor([numbered]), "image_embeds_position_mask": torch.tensor([mask])}


def who_sees_which_tile(model: Lvlm, ids: list[int], looks: Sequence[Look], text: str) -> dict[str, Tensor]:
    """Llama-3.2-Vision: from an image's placeholder on, tokens see the tiles of that image."""
    del text
    slots = int(looks[0].inputs["pixel_values"].shape[2])
    mask = torch.zeros(1, len(ids), len(looks), slots, dtype=torch.long)
    starts = [i for i, token in enumerate(ids) if token == model.content_id]
    ends = [*starts[1:], len(ids)]
    for n in reversed(range(len(starts) - 1)):
        if starts[n] + 1 == starts[n + 1]:  # images side by side are seen by all that follow both
            ends[n] = ends[n + 1]
    for n, (start, end, look) in enumerate(zip(starts, ends, looks, strict=True)):
        mask[0, start:end, n, : len(look.lattices["vision"])] = 1
    return {"cross_attention_mask": mask}
