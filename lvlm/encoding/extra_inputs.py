"""Inputs of a family's model other than tokens and pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.interfaces import EncodedImage, Model


def qformer_question(model: Model, ids: list[int], images: Sequence[EncodedImage], text: str) -> dict[str, Tensor]:
    """InstructBLIP: the text for its Q-Former, once per image."""
    del ids
    if "qformer_input_ids" not in model.accepts:
        return {}
    tokenizer = getattr(model.processor, "qformer_tokenizer", None)
    if tokenizer is None:
        msg = (
            f"{model.name} has a Q-Former that reads the question, but its processor has no qformer_tokenizer; load the "
            "model with a processor that has one"
        )
        raise ModelError(msg)
    question = torch.tensor([tokenizer(text)["input_ids"]] * len(images))
    return {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}


def image_position_mask(model: Model, ids: list[int], images: Sequence[EncodedImage], text: str) -> dict[str, Tensor]:
    """Kosmos-2: a mask of the image's positions, and token ids that are running numbers there."""
    del text
    if len(images) != 1:
        msg = f"{model.name} takes one image per prompt, not {len(images)}"
        raise ModelError(msg)
    count = images[0].sequence["projector"]
    first = ids.index(model.content_id) + 1
    unknown = model.processor.tokenizer.unk_token_id or 0
    numbered = [*ids[:first], *range(unknown + 1, unknown + 1 + count), *ids[first + count :]]
    mask = [int(first <= i < first + count) for i in range(len(ids))]
    return {"input_ids": torch.tensor([numbered]), "image_embeds_position_mask": torch.tensor([mask])}


def tile_attention_mask(model: Model, ids: list[int], images: Sequence[EncodedImage], text: str) -> dict[str, Tensor]:
    """Llama-3.2-Vision: from an image's placeholder on, tokens attend to the tiles of that image."""
    del text
    slots = int(images[0].inputs["pixel_values"].shape[2])
    mask = torch.zeros(1, len(ids), len(images), slots, dtype=torch.long)
    starts = [i for i, token in enumerate(ids) if token == model.content_id]
    ends = [*starts[1:], len(ids)]
    for n in reversed(range(len(starts) - 1)):
        if starts[n] + 1 == starts[n + 1]:  # tokens after adjacent images attend to all of them
            ends[n] = ends[n + 1]
    for n, (start, end, image) in enumerate(zip(starts, ends, images, strict=True)):
        mask[0, start:end, n, : len(image.views["vision"])] = 1
    return {"cross_attention_mask": mask}
