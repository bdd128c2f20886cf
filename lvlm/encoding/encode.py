"""Encode a prompt and its images: model inputs, and a map of the roles of their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from concepts.annotated_object import Box
from concepts.mention import Mention
from concepts.schema import Example
from groundscope.core.errors import DataError, ModelError
from groundscope.core.text import format_count
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.encoding.tokens_after_prompt import TextTokens, prefix_tokens
from lvlm.image_tokens import image_in_sequence, image_tokens
from lvlm.interfaces import EncodedImage, Model
from lvlm.prompting import find_question
from lvlm.sites import Stack
from lvlm.token_map import ImageView, TokenMap

Inputs = dict[str, Tensor]
Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class Encoding:
    """One encoded example."""

    example: Example
    inputs: Inputs
    """Model inputs by name, on the CPU, with a leading batch axis of 1; patches of packed images have no batch axis."""
    tokens: TokenMap

    @property
    def shape(self) -> tuple[Any, ...]:
        """Key that is equal for encodings that can share a batch without padding."""
        return (self.tokens.length, *((name, tuple(x.shape)) for name, x in sorted(self.inputs.items())))

    @property
    def image_key(self) -> str:
        """Identity of the images; equal for encodings about the same images."""
        return "\n".join(image.identity for image in self.example.images)


@dataclass(frozen=True)
class Batch:
    """Encodings of equal shape and their stacked inputs; nothing is padded."""

    index: tuple[int, ...]
    """Index of each row in the sequence of examples."""
    encodings: tuple[Encoding, ...]
    inputs: Inputs

    @property
    def images(self) -> tuple[str, ...]:
        """Identity of each row's images; equal for rows about the same images."""
        return tuple(e.image_key for e in self.encodings)


@dataclass(frozen=True)
class Prompt:
    """A text about images."""

    text: str
    """Text with the model's placeholder once per image, up to where the answer begins."""
    question: str = ""
    """Part of the text whose words the token selection ``question`` selects."""
    name: str = "prompt"
    """Name of the prompt in error messages."""
    boxes: Mapping[str, tuple[int, Box]] | None = None
    """Object id to the index of its image and its pixel box."""
    subject: str | None = None
    """Id of the object that the token selection ``object`` selects."""
    prefix: str = ""
    """Start of the answer that the model has already written; its tokens follow those of the text."""
    mentions: tuple[Mention, ...] = ()
    """Objects that the prefix mentions."""


def encode(
    model: Model, prompt: Prompt, images: Sequence[EncodedImage], sizes: Sequence[tuple[int, int]] = ()
) -> tuple[Inputs, TokenMap]:
    """Return the inputs and the token map of a prompt, followed by its prefix.

    Parameters
    ----------
    model
        The model that will read it.
    prompt
        The text.
    images
        Its encoded images, in order.
    sizes
        Width and height of each image, for error messages.

    Raises
    ------
    DataError
        If the number of placeholders is not that of the images, the tokenizer splits image tokens, or the images differ in
        size and the family does not pad them; also if the prefix is white space or has tokens that are not text.
    ModelError
        If the tokenizer is not a fast tokenizer.
    """
    if not images and not runs_without_image(model):
        msg = (
            f"example '{prompt.name}' has no image, and {model.name} ({model.spec.model_type}) does not run without one; leave "
            "such examples out: data.filter(lambda e: e.images)"
        )
        raise DataError(msg)
    text, image_spans = _insert_images(model, prompt, images)
    ids, offsets = _tokenize(model, text, images)
    _check_image_tokens(model, prompt, ids, images)
    question = _question_positions(model, prompt, text, offsets)
    inputs: Inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    for name in images[0].inputs if images else ():
        inputs[name] = _join(model, prompt.name, [image.inputs[name] for image in images], sizes)
    content = model.content_id
    of_image = [token == content for token in ids]
    # Models need token types for positions with three axes, or for bidirectional attention among image tokens.
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in model.accepts:
            inputs[name] = torch.tensor([[int(here and model.spec.token_types) for here in of_image]])
    if images and model.image_encoding.extra_inputs is not None:
        inputs.update(model.image_encoding.extra_inputs(model, ids, images, text))
    positions = image_tokens(model, inputs)[0].nonzero().flatten().tolist() if image_in_sequence(model) else []
    views = _place_views(model, images, positions)
    if not images:  # stacks that would contain an image contain none: selections of image tokens are empty, not errors
        stacks: tuple[Stack, ...] = ("vision", "projector", *(("decoder",) if image_in_sequence(model) else ()))
        views = dict.fromkeys(stacks, ())
    sequence: dict[Stack, int] = {}
    for image in images:
        for stack, length in image.sequence.items():
            sequence[stack] = sequence.get(stack, 0) + length
    if model.encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[decoder_start(model)]])
        tokens = TokenMap(
            1, (), views, boxes=prompt.boxes or {}, subject=prompt.subject, sequence=sequence, encoder=True
        )
        return _with_prefix(model, prompt, inputs, tokens)
    with_image = _tokens_in(offsets, image_spans) | {i for i, here in enumerate(of_image) if here}
    separators = tuple(sorted(with_image - set(positions)))
    tokens = TokenMap(len(ids), question, views, separators, prompt.boxes or {}, prompt.subject, sequence)
    return _with_prefix(model, prompt, inputs, tokens)


def _with_prefix(model: Model, prompt: Prompt, inputs: Inputs, tokens: TokenMap) -> tuple[Inputs, TokenMap]:
    """Append the tokens of the prefix, as if the model had generated them."""
    if not prompt.prefix:
        return inputs, tokens
    written = prefix_tokens(model, prompt.text, prompt.prefix, prompt.name)
    length = tokens.length + len(written.ids)
    mentions = tuple(_place_mention(model, prompt, written, mention, tokens.length) for mention in prompt.mentions)
    return append_tokens(model, inputs, [list(written.ids)]), replace(
        tokens, length=length, prefix=tuple(range(tokens.length, length)), mentions=mentions
    )


def _place_mention(model: Model, prompt: Prompt, written: TextTokens, mention: Mention, offset: int) -> tuple[int, int]:
    """Return the first and the last position of a mention."""
    inside = 0 <= mention.start < mention.stop <= len(prompt.prefix)
    positions = written.positions(mention.start, mention.stop) if inside else ()
    if not positions:
        problem = (
            f"{model.name}'s tokenizer has no token"
            if inside
            else f"the prefix has {len(prompt.prefix)} characters, not"
        )
        msg = (
            f"example '{prompt.name}': {problem} at characters {mention.start}-{mention.stop - 1}, where it should mention "
            f"'{mention.noun}'; make mentions of this prefix with concepts.with_mentions"
        )
        raise DataError(msg)
    return offset + positions[0], offset + positions[-1]


def runs_without_image(model: Model) -> bool:
    """Whether a model answers prompts without an image: its forward pass runs without pixels, and no encoder reads them."""
    pixels = inspect.signature(model.hf.forward).parameters.get("pixel_values")
    needed = pixels is not None and pixels.default is pixels.empty and pixels.kind is not pixels.VAR_KEYWORD
    return model.image_encoding.runs_without_image and not needed and not model.encoder_decoder


def check_alike(encodings: Sequence[Encoding]) -> None:
    """Raise `DataError` if there are no encodings, or if they differ in shape and cannot share a batch."""
    if not encodings:
        msg = "no examples to put into a batch; give at least one"
        raise DataError(msg)
    first = encodings[0]
    other = next((e for e in encodings if e.shape != first.shape), None)
    if other is None:
        return
    names = sorted({*first.inputs, *other.inputs})
    shapes = {n: tuple(list(e.inputs[n].shape) if n in e.inputs else "none" for e in (first, other)) for n in names}
    differences = [f"{name} ({a} and {b})" for name, (a, b) in shapes.items() if a != b]
    msg = (
        f"examples '{first.example.id}' and '{other.example.id}' differ in "
        f"{', '.join(differences) or 'the number of decoder tokens'}, and batches are not padded; batch them with "
        "model.batches"
    )
    raise DataError(msg)


def decoder_start(model: Model) -> int:
    """Return the token that an encoder-decoder's answer begins with; raises `ModelError` if none is set."""
    text = getattr(model.hf.config, "text_config", None)
    configs: tuple[Any, ...] = (model.hf.generation_config, model.hf.config, text)
    for config in configs:
        if getattr(config, "decoder_start_token_id", None) is not None:
            return int(config.decoder_start_token_id)
    msg = f"{model.name} is an encoder-decoder without decoder_start_token_id; set it in the model's generation_config"
    raise ModelError(msg)


def _insert_images(model: Model, prompt: Prompt, images: Sequence[EncodedImage]) -> tuple[str, list[Span]]:
    """Replace each placeholder by its image's text; return the text and the spans of the images."""
    placeholder = model.placeholder
    parts = prompt.text.split(placeholder)
    if model.spec.image_first:
        if len(parts) > 1:
            msg = f"example '{prompt.name}': the question contains '{placeholder}', the placeholder of an image; remove it"
            raise DataError(msg)
        return prompt.text, []
    if len(parts) - 1 != len(images):
        msg = (
            f"example '{prompt.name}': the prompt has {len(parts) - 1} image placeholders ('{placeholder}') but "
            f"{format_count(len(images), 'image')}"
        )
        raise DataError(msg)
    if not images:
        return prompt.text, []
    text, spans = parts[0], []
    for image, part in zip(images, parts[1:], strict=True):
        spans.append((len(text), len(text) + len(image.text)))
        text += image.text + part
    return text, spans


def _tokenize(model: Model, text: str, images: Sequence[EncodedImage]) -> tuple[list[int], list[Span]]:
    """Return token ids, with leading image tokens for families that need them first, and the span of each token."""
    tokenizer = model.processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        msg = (
            f"{type(tokenizer).__name__} of {model.name} does not return the character offsets of tokens; use a fast "
            "tokenizer (PreTrainedTokenizerFast); transformers can convert most"
        )
        raise ModelError(msg)
    leading = "".join(image.text for image in images) if model.spec.image_first else ""
    first = tokenizer(leading, add_special_tokens=False)["input_ids"] if leading else []
    special = model.spec.special_tokens and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    return [*first, *encoded["input_ids"]], [(0, 0)] * len(first) + list(encoded["offset_mapping"])


def _check_image_tokens(model: Model, prompt: Prompt, ids: Sequence[int], images: Sequence[EncodedImage]) -> None:
    count, expected = ids.count(model.content_id), sum(image.text.count(model.content_token) for image in images)
    if count != expected:
        msg = (
            f"example '{prompt.name}': {count} image tokens in the prompt, {expected} expected; the tokenizer splits "
            f"'{model.content_token}', or the question contains it"
        )
        raise DataError(msg)


def _question_positions(model: Model, prompt: Prompt, text: str, offsets: Sequence[Span]) -> tuple[int, ...]:
    span = find_question(text, prompt.question)
    if span is None:
        msg = (
            f"example '{prompt.name}': the chat template of {model.name} does not repeat the question "
            f"'{prompt.question.strip()}' word for word, so its tokens cannot be found; set processor.chat_template to a "
            "template that does"
        )
        raise DataError(msg)
    return tuple(sorted(_tokens_in(offsets, [span])))


def _tokens_in(offsets: Sequence[Span], spans: Sequence[Span]) -> set[int]:
    """Return the tokens that overlap spans of the text."""
    return {i for start, end in spans for i, (a, b) in enumerate(offsets) if b > a and a < end and b > start}


def _join(model: Model, name: str, parts: list[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Concatenate an input of several images, padded with zeros at the end as in transformers' image processors."""
    if len(parts) == 1:
        return parts[0]  # not copied: hundreds of questions about one image share its pixels until their batch is built
    dim = model.image_encoding.axis if parts[0].dim() > 3 else 0
    shapes = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if len(shapes) > 1 and not (model.image_encoding.pads and parts[0].dim() > 3):
        listed = " and ".join(dict.fromkeys(f"{width} x {height}" for width, height in sizes)) or "different sizes"
        msg = (
            f"example '{name}': images of {listed} pixels cannot share a prompt of {model.name} ({model.spec.model_type}); "
            "resize them to one size first"
        )
        raise DataError(msg)
    if len(shapes) > 1:
        largest = [max(part.shape[i] for part in parts) for i in range(parts[0].dim())]
        largest[dim] = 0  # the concatenated axis is not padded
        missing = [[max(0, largest[i] - part.shape[i]) for i in range(part.dim())] for part in parts]
        parts = [
            torch.nn.functional.pad(part, [n for more in reversed(fill) for n in (0, more)])
            for part, fill in zip(parts, missing, strict=True)
        ]
    return torch.cat(parts, dim=dim)


def _place_views(
    model: Model, images: Sequence[EncodedImage], positions: Sequence[int]
) -> dict[Stack, tuple[ImageView, ...]]:
    """Return the views of all images with positions in the full sequences; `positions` are those of the image tokens."""
    expected = sum(len(view.positions) for image in images for view in image.views.get("decoder", ()))
    if image_in_sequence(model) and len(positions) != expected:
        msg = (
            f"the image encoding '{model.spec.view}' of {model.name} returns views of {expected} image tokens, but its "
            f"image_token_mask selects {len(positions)}; it must select the tokens of the views"
        )
        raise ModelError(msg)
    placed: dict[Stack, tuple[ImageView, ...]] = {}
    tokens_before, length_before = 0, {"vision": 0, "projector": 0}
    for number, image in enumerate(images):
        for stack, views in image.views.items():
            if stack == "decoder":
                if not positions:
                    continue
                shifted = tuple(
                    ImageView(tuple(positions[tokens_before + p] for p in v.positions), v.grid, v.kind, number)
                    for v in views
                )
                tokens_before += sum(len(v.positions) for v in views)
            else:
                shifted = tuple(v.shifted(length_before[stack], number) for v in views)
            placed[stack] = (*placed.get(stack, ()), *shifted)
        length_before = {
            stack: length + image.sequence.get(stack, 0)  # type: ignore[call-overload]
            for stack, length in length_before.items()
        }
    return placed
