"""Answers as text: to a question about images, to any prompt about images, and to a batch of examples.

Answers are greedy (`lvlm.generation`) or sampled (`lvlm.sampling`); while a decoder is active, it chooses their tokens
(`lvlm.decoding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from concepts.image_source import NoImage
from concepts.schema import Example
from groundscope.core.errors import ModelError
from lvlm.encoding.encode import Batch, Encoding
from lvlm.generation import greedy
from lvlm.images import MemoryImage, as_rgb
from lvlm.sampling import Sampling

if TYPE_CHECKING:
    from lvlm.decoding.prefix_run import PrefixBatch
    from lvlm.model import Lvlm


def answer_prompt(
    model: Lvlm, images: Any, prompt: str, max_new_tokens: int, *, question: str = "", system: str | None = None
) -> str:
    """Return the greedy continuation of a prompt as text.

    Parameters
    ----------
    model
        The model.
    images
        One image in any form that `lvlm.images.as_rgb` reads, or a list of them in the order of their placeholders.
    prompt
        Text with the model's placeholder once per image, up to where the answer begins.
    max_new_tokens
        Largest number of tokens of the answer.
    question
        Part of the prompt that is the user's question; a decoder may write another prompt for it.
    system
        System prompt that the prompt contains, for such a decoder.

    Raises
    ------
    DataError
        If an image cannot be read, or the prompt does not fit the images.
    ModelError
        For fewer than one token, and if the logits are not finite.
    """
    if max_new_tokens < 1:
        msg = f"max_new_tokens={max_new_tokens}; it must be at least 1"
        raise ModelError(msg)
    pictures = [as_rgb(image) for image in (images if isinstance(images, list | tuple) else [images])]
    inputs, tokens = model.encode_prompt(prompt, pictures, question=question)
    if model.decoder is None:
        return _texts(model, greedy(model, model.on_device(inputs), max_new_tokens))[0]
    first, *further = map(MemoryImage.of, pictures) if pictures else (NoImage(),)
    example = Example(
        *("prompt", first, question, "", (), "object", "open", "", "prompt"),
        further_images=tuple(further),
        system=system,
    )
    batch = Batch((0,), (Encoding(example, inputs, tokens),), model.on_device(inputs))
    return _texts(model, model.decoder.generate(model, batch, max_new_tokens))[0]


def answer_batch(
    model: Lvlm, batch: Batch | PrefixBatch, max_new_tokens: int, sampling: Sampling | None = None
) -> list[str]:
    """Return the answers to a batch as text, without the prefixes that they continue; greedy, or sampled by example id."""
    if not isinstance(batch, Batch):
        return _texts(model, batch.generate(max_new_tokens, sampling=sampling))
    if model.decoder is not None:
        return _texts(model, model.decoder.generate(model, batch, max_new_tokens, sampling))
    choose = None if sampling is None else sampling.processor([e.example.id for e in batch.encodings])
    return _texts(model, greedy(model, batch.inputs, max_new_tokens, images=batch.images, choose=choose))


@torch.no_grad()
def answer_logits(model: Lvlm, batch: Batch | PrefixBatch) -> Tensor:
    """Return the logits that the first token of each answer is chosen from, ``[B, V]``: the decoder's if one is active."""
    if not isinstance(batch, Batch):
        return batch.logits()
    if model.decoder is not None:
        return model.decoder.first_logits(model, batch)
    return model.logits(batch.inputs, batch.images)


def _texts(model: Lvlm, answers: Sequence[Sequence[int]]) -> list[str]:
    return [t.strip() for t in model.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]
