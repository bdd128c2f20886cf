"""Branches that several methods compare with: without an image, with other pixels, or with other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from concepts.image_source import ImageSource
from concepts.schema import Example
from groundscope.core.errors import DataError, ModelError
from lvlm.decoding.decoder import Branch, Prompts
from lvlm.encoding.encode import runs_without_image
from lvlm.image_tokens import image_in_sequence, image_tokens

if TYPE_CHECKING:
    from lvlm.encoding.encode import Batch, Encoding
    from lvlm.model import Lvlm

FillerPlace = Literal["each token", "each image", "all images"]
"""What tokens stand in place of, in `replaced_image`."""


def check_runs_without_image(model: Lvlm, label: str) -> None:
    """Raise `ModelError` for a family that cannot answer a prompt without its image."""
    if not runs_without_image(model):
        msg = (
            f"{label} compares with the prompt without its image, and {model.name} ({model.spec.model_type}) does not run "
            "without one"
        )
        raise ModelError(msg)


def without_image(model: Lvlm, batch: Batch) -> Branch:
    """Return the prompts without their image tokens; markers around them and newlines stay, positions are those of text."""
    return replaced_image(model, batch, "no image", [()] * len(batch.encodings), at="all images")


def unknown_image(model: Lvlm, batch: Batch, *, single: bool = False) -> Branch:
    """Return the prompts with ``<unk>`` in place of each image token, or in place of each whole image with `single`.

    Raises
    ------
    ModelError
        If the tokenizer has no token for unknown words.
    """
    fillers = [(unknown_token(model),)] * len(batch.encodings)
    return replaced_image(model, batch, "unknown image", fillers, at="each image" if single else "each token")


def unknown_token(model: Lvlm) -> int:
    """Return the token for unknown words; raises `ModelError` if the tokenizer has none."""
    unknown = model.processor.tokenizer.unk_token_id
    if unknown is None:
        msg = f"the tokenizer of {model.name} has no token for unknown words to put in place of the image; use another form"
        raise ModelError(msg)
    return int(unknown)


def replaced_image(
    model: Lvlm, batch: Batch, name: str, fillers: Sequence[Sequence[int]], *, at: FillerPlace
) -> Branch:
    """Return the prompts as text, with other tokens in place of the image tokens.

    Parameters
    ----------
    model, batch
        The model and the prompts.
    name
        Name of the branch.
    fillers
        For each prompt the tokens in place of the image.
    at
        Where they are: in place of each image token, of each image (all its tiles), or of all images of the prompt together.
    """
    ids = batch.inputs["input_ids"]
    image = image_tokens(model, batch.inputs) if image_in_sequence(model) else ids == model.content_id
    rows: dict[int, list[tuple[int, list[int]]]] = {}
    for row, (tokens, marks) in enumerate(zip(ids.tolist(), image.tolist(), strict=True)):
        marked = [i for i, mark in enumerate(marks) if mark]
        starts = set(marked)
        if at == "each image":
            views = batch.encodings[row].tokens.views.get("decoder", ())
            firsts: dict[int, int] = {}
            for view in views:
                firsts[view.image] = min(firsts.get(view.image, len(tokens)), *view.positions)
            starts = set(firsts.values()) if views else set(marked[:1])
        elif at == "all images":
            starts = set(marked[:1])
        text: list[int] = []
        for i, token in enumerate(tokens):
            if i in starts:
                text.extend(fillers[row])
            elif not marks[i]:
                text.append(token)
        rows.setdefault(len(text), []).append((row, text))
    prompts = []
    for items in rows.values():
        tokens = torch.tensor([text for _, text in items], device=ids.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        for other in ("mm_token_type_ids", "token_type_ids"):
            if other in model.accepts:
                inputs[other] = torch.zeros_like(tokens)
        prompts.append(Prompts(tuple(row for row, _ in items), inputs))
    return Branch(name, tuple(prompts))


def with_pixels(model: Lvlm, batch: Batch, name: str, change: Callable[[Example, str, Tensor], Tensor]) -> Branch:
    """Return the prompts with other pixels.

    Parameters
    ----------
    model, batch
        The model and the prompts.
    name
        Name of the branch.
    change
        Function of an example, the name of a floating input (``pixel_values``) and its values that returns new values of equal
        shape.
    """

    def changed(encoding: Encoding) -> Encoding:
        inputs = {
            key: change(encoding.example, key, x) if x.is_floating_point() else x for key, x in encoding.inputs.items()
        }
        return replace(encoding, inputs=inputs)

    branch = Branch.of(name, model, [changed(encoding) for encoding in batch.encodings])
    # Pixels are random for each answer, so rows about one image differ.
    return replace(branch, prompts=tuple(replace(group, images=()) for group in branch.prompts))


def with_examples(model: Lvlm, batch: Batch, name: str, change: Callable[[Example], Example]) -> Branch:
    """Return the prompts of changed examples: other words, another system prompt, or another image.

    Raises
    ------
    DataError
        For a prompt without a question, as in `Lvlm.generate`.
    """
    return Branch.of(name, model, [model.encode(change(example)) for example in examples_of(batch, name)])


def with_images(model: Lvlm, batch: Batch, name: str, images: Sequence[Sequence[ImageSource]]) -> Branch:
    """Return the prompts about other images, given for each prompt as many as it has; boxes do not belong to them."""
    examples = [
        replace(example, image=others[0], further_images=tuple(others[1:]), objects=(), subject=None)
        if others
        else example
        for example, others in zip(examples_of(batch, name), images, strict=True)
    ]
    return Branch.of(name, model, [model.encode(example) for example in examples])


def examples_of(batch: Batch, purpose: str) -> list[Example]:
    """Return the examples of a batch; raises `DataError` for a prompt without a question, as in `Lvlm.generate`."""
    examples = [encoding.example for encoding in batch.encodings]
    if any(not example.question for example in examples):
        msg = f"{purpose}: another prompt is written for the question, and Lvlm.generate receives none; use Lvlm.ask"
        raise DataError(msg)
    return examples
