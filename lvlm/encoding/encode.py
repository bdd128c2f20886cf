"""From a prompt and its images to the tensors a model takes, and a map of which token is what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from concepts.schema import Box, Example
from groundscope.core.errors import DataError, ModelError
from lvlm.encoding.image_inputs import Look
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


def encode(model: Lvlm, prompt: Prompt, looks: Sequence[Look], axis: int) -> tuple[Inputs, TokenMap]:
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

    Raises
    ------
    DataError
        Where the prompt has not as many placeholders as there are images, or the tokenizer does not keep image tokens.
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
    lattices = _lay(model, looks, cells)
    used = {p for lattice in lattices.get("decoder", ()) for p in lattice.positions}
    inside = {i for s, e in spans for i, (a, b) in enumerate(offsets) if b > a and a < e and b > s}
    separators = tuple(sorted((inside | set(cells)) - used))
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
    for name, first_look in looks[0].inputs.items():
        # One picture is not copied: hundreds of questions may wait for their batch with it.
        inputs[name] = (
            first_look
            if len(looks) == 1
            else torch.cat([look.inputs[name] for look in looks], dim=axis if first_look.dim() > 3 else 0)
        )
    # Which tokens are an image's: for positions in three axes, or for attention that runs both ways among them.
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in model.accepts:
            marked = torch.tensor([[int(token == model.content_id and model.spec.token_types) for token in ids]])
            inputs[name] = marked
    inputs.update(model.view.finish(model, ids, looks, text) if model.view.finish else {})
    sequence: dict[Stack, int] = {}
    for look in looks:
        for stack, length in look.sequence.items():
            sequence[stack] = sequence.get(stack, 0) + length
    if model.encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[decoder_start(model)]])
        lattices.pop("decoder", None)
        question, separators = (), ()
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


def _lay(model: Lvlm, looks: Sequence[Look], cells: Sequence[int]) -> dict[Stack, tuple[Lattice, ...]]:
    """Move each image's views to where they stand among those of all images."""
    found: dict[Stack, tuple[Lattice, ...]] = {}
    before, seen = 0, {"vision": 0, "projector": 0}
    for image, look in enumerate(looks):
        for stack, views in look.lattices.items():
            if stack == "decoder":
                moved = tuple(
                    Lattice(tuple(cells[before + p] for p in v.positions), v.grid, v.kind, image) for v in views
                )
            else:
                moved = tuple(v.moved(seen[stack], image) for v in views)
            found[stack] = (*found.get(stack, ()), *moved)
        before += look.text.count(model.content_token)
        seen = {stack: length + look.sequence.get(stack, 0) for stack, length in seen.items()}  # type: ignore[call-overload]
    return found
