"""From a prompt and its images to the tensors a model takes, and a map of which token is what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from concepts.schema import Box, Example
from groundscope.core.errors import DataError, ModelError
from lvlm.encoding.encoded_image import Look
from lvlm.image_tokens import image_in_sequence, image_tokens
from lvlm.prompting import find_question
from lvlm.sites import Stack
from lvlm.token_map import Lattice, TokenMap

if TYPE_CHECKING:
    from lvlm.model import Lvlm

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Encoding:
    """One example as the model takes it."""

    example: Example
    inputs: Inputs
    """Model inputs by name, each with a leading batch axis of 1 (packed patches: of as many as there are), on the CPU."""
    tokens: TokenMap

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two encodings must have in common to share a batch without padding."""
        return (self.tokens.length, *((name, tuple(x.shape)) for name, x in sorted(self.inputs.items())))


def check_alike(encodings: Sequence[Encoding]) -> None:
    """Raise `DataError` naming what differs where encodings cannot share a batch, or where there are none."""
    if not encodings:
        msg = "no examples to put into a batch: give at least one"
        raise DataError(msg)
    first = encodings[0]
    other = next((e for e in encodings if e.shape != first.shape), None)
    if other is None:
        return
    names = sorted({*first.inputs, *other.inputs})
    shapes = {n: tuple(list(e.inputs[n].shape) if n in e.inputs else None for e in (first, other)) for n in names}
    unlike = [f"{name} ({one or 'none'} and {two or 'none'})" for name, (one, two) in shapes.items() if one != two]
    msg = (
        f"examples '{first.example.id}' and '{other.example.id}' differ in "
        f"{', '.join(unlike) or 'the length of what the decoder reads'}: nothing is padded; batch them with model.batches"
    )
    raise DataError(msg)


@dataclass(frozen=True)
class Batch:
    """Encodings of equal shape, side by side; nothing is padded."""

    index: tuple[int, ...]
    """Place of each row in the sequence the batch was cut from."""
    encodings: tuple[Encoding, ...]
    inputs: Inputs

    @property
    def images(self) -> tuple[str, ...]:
        """Identity of each row's image: rows that ask about the same one share it."""
        return tuple(e.example.image.identity for e in self.encodings)


@dataclass(frozen=True)
class Prompt:
    """What is asked about some images."""

    text: str
    """With the model's placeholder once for each image, up to where the answer begins."""
    question: str = ""
    """The part of it that is the question itself; its words are what ``question`` selects."""
    name: str = "prompt"
    """What to call it in errors."""
    boxes: Mapping[str, tuple[int, Box]] | None = None
    """Object id to its image and pixel box."""
    subject: str | None = None


def encode(
    model: Lvlm, prompt: Prompt, looks: Sequence[Look], axis: int, sizes: Sequence[tuple[int, int]] = ()
) -> tuple[Inputs, TokenMap]:
    """Return the inputs and the token map of a prompt.

    Parameters
    ----------
    model
        The model that will read it.
    prompt
        The text.
    looks
        What each of its images became, in order.
    axis
        Along which axis pixels of several images are joined.
    sizes
        Width and height of each image, for errors.

    Raises
    ------
    DataError
        Where the prompt has not as many placeholders as there are images, the tokenizer does not keep image tokens, or the
        images differ in size and the family does not pad them.
    """
    tokenizer = model.processor.tokenizer
    text, spans = _expand(model, prompt, looks)
    leading = "".join(look.text for look in looks) if model.spec.image_first else ""
    if not getattr(tokenizer, "is_fast", False):
        msg = (
            f"{type(tokenizer).__name__} of {model.name} does not tell where in a text its tokens stand: give a fast "
            "tokenizer (PreTrainedTokenizerFast), into which transformers can convert most"
        )
        raise ModelError(msg)
    special = model.spec.special_tokens and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    first = tokenizer(leading, add_special_tokens=False)["input_ids"] if leading else []
    ids: list[int] = [*first, *read["input_ids"]]
    offsets = [(0, 0)] * len(first) + list(read["offset_mapping"])
    cells = [i for i, token in enumerate(ids) if token == model.content_id]
    expected = sum(look.text.count(model.content_token) for look in looks)
    if len(cells) != expected:
        msg = (
            f"example '{prompt.name}': {len(cells)} image tokens in the prompt, {expected} expected; the tokenizer does not "
            f"keep '{model.content_token}' as one token, or the question holds it"
        )
        raise DataError(msg)
    span = find_question(text, prompt.question)
    if span is None:
        msg = (
            f"example '{prompt.name}': the chat template of {model.name} does not repeat the question "
            f"'{prompt.question.strip()}' word for word, so its tokens cannot be found; set processor.chat_template to one "
            "that does"
        )
        raise DataError(msg)
    start, end = span
    question = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a)
    inputs: Inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    for name in looks[0].inputs:
        inputs[name] = _join(model, prompt.name, [look.inputs[name] for look in looks], axis, sizes)
    # Which tokens are an image's: for positions in three axes, or for attention that runs both ways among them.
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in model.accepts:
            marked = torch.tensor([[int(token == model.content_id and model.spec.token_types) for token in ids]])
            inputs[name] = marked
    inputs.update(model.view.finish(model, ids, looks, text) if model.view.finish else {})
    image = image_tokens(model, inputs)[0].nonzero().flatten().tolist() if image_in_sequence(model) else []
    placed = sum(len(view.positions) for look in looks for view in look.lattices.get("decoder", ()))
    if image_in_sequence(model) and len(image) != placed:
        msg = (
            f"view '{model.spec.view}' of {model.name} places {placed} image tokens and marks {len(image)}: View.mark must mark "
            "the tokens of its lattices"
        )
        raise ModelError(msg)
    lattices = _lay(looks, image)
    separators = () if model.encoder_decoder else tuple(sorted((_within(offsets, spans) | set(cells)) - set(image)))
    sequence: dict[Stack, int] = {}
    for look in looks:
        for stack, length in look.sequence.items():
            sequence[stack] = sequence.get(stack, 0) + length
    if model.encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[decoder_start(model)]])
        question = ()
    length = 1 if model.encoder_decoder else len(ids)
    tokens = TokenMap(
        length,
        question,
        lattices,
        separators,
        prompt.boxes or {},
        prompt.subject,
        sequence,
        encoder=model.encoder_decoder,
    )
    return inputs, tokens


def decoder_start(model: Lvlm) -> int:
    """Return the token an encoder-decoder begins its answer with; raises `ModelError` where none is set."""
    text = getattr(model.hf.config, "text_config", None)
    configs: tuple[Any, ...] = (model.hf.generation_config, model.hf.config, text)
    for config in configs:
        if getattr(config, "decoder_start_token_id", None) is not None:
            return int(config.decoder_start_token_id)
    msg = f"{model.name} is an encoder-decoder without decoder_start_token_id: set it in the model's generation_config"
    raise ModelError(msg)


def _expand(model: Lvlm, prompt: Prompt, looks: Sequence[Look]) -> tuple[str, list[tuple[int, int]]]:
    """Put each image's own text in the place of its placeholder; return where those texts stand."""
    placeholder = model.placeholder
    parts = prompt.text.split(placeholder)
    if model.spec.image_first:
        if len(parts) > 1:
            msg = f"example '{prompt.name}': the question holds '{placeholder}', which stands for an image"
            raise DataError(msg)
        return prompt.text, []
    if len(parts) - 1 != len(looks) or not looks:
        msg = (
            f"example '{prompt.name}': the prompt holds {len(parts) - 1} image placeholders ('{placeholder}'), not "
            f"{len(looks)}, the number of its images"
            + ("" if looks else f"; {model.name} is asked about images: give at least one")
        )
        raise DataError(msg)
    text, spans = parts[0], []
    for look, part in zip(looks, parts[1:], strict=True):
        spans.append((len(text), len(text) + len(look.text)))
        text += look.text + part
    return text, spans


def _join(model: Lvlm, name: str, parts: list[Tensor], axis: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Join an input of several images, filled up with zeros at the end as transformers' image processors do."""
    if len(parts) == 1:
        return parts[0]  # not copied: hundreds of questions may wait for their batch with it
    dim = axis if parts[0].dim() > 3 else 0
    alike = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if len(alike) > 1 and not (model.view.pads and parts[0].dim() > 3):
        shown = " and ".join(dict.fromkeys(f"{width} x {height}" for width, height in sizes)) or "unlike sizes"
        msg = (
            f"example '{name}': images of {shown} pixels cannot share a prompt of {model.name} ({model.spec.model_type}): resize "
            "them to one size first"
        )
        raise DataError(msg)
    if len(alike) > 1:
        most = [max(part.shape[i] for part in parts) for i in range(parts[0].dim())]
        most[dim] = 0  # joined along this one
        filled = [[max(0, most[i] - part.shape[i]) for i in range(part.dim())] for part in parts]
        parts = [
            torch.nn.functional.pad(part, [n for more in reversed(fill) for n in (0, more)])
            for part, fill in zip(parts, filled, strict=True)
        ]
    return torch.cat(parts, dim=dim)


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> set[int]:
    """Return the tokens that stand in some spans of the text."""
    return {i for s, e in spans for i, (a, b) in enumerate(offsets) if b > a and a < e and b > s}


def _lay(looks: Sequence[Look], image: Sequence[int]) -> dict[Stack, tuple[Lattice, ...]]:
    """Move each image's views to where they stand among those of all images; `image` are the image tokens in order."""
    found: dict[Stack, tuple[Lattice, ...]] = {}
    before, seen = 0, {"vision": 0, "projector": 0}
    for number, look in enumerate(looks):
        for stack, views in look.lattices.items():
            if stack == "decoder":
                if not image:
                    continue
                moved = tuple(
                    Lattice(tuple(image[before + p] for p in v.positions), v.grid, v.kind, number) for v in views
                )
                before += sum(len(v.positions) for v in views)
            else:
                moved = tuple(v.moved(seen[stack], number) for v in views)
            found[stack] = (*found.get(stack, ()), *moved)
        seen = {stack: length + look.sequence.get(stack, 0) for stack, length in seen.items()}  # type: ignore[call-overload]
    return found
