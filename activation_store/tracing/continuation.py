"""Inputs that go on after the prompt: with the model's own answer, or with one put there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError, DataError
from lvlm.answers import answer_tokens
from lvlm.generation import greedy
from lvlm.model import Batch, Lvlm
from lvlm.sites import TokenSelection
from lvlm.token_map import TokenMap

# What a row of the inputs says of a token that follows the prompt; masks over tiles go on as they end.
_AFTER_PROMPT = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 1, "image_embeds_position_mask": 0}


GoesOn = Literal["", "generated", "answer"]
"""What follows the prompt: nothing, the model's own answer, or the true one."""


@dataclass(frozen=True)
class Continued:
    """A batch whose rows go on after the prompt."""

    inputs: dict[str, Tensor]
    tokens: tuple[TokenMap, ...]
    """Maps that know where the answers' tokens are."""
    extra: int
    """Positions after the prompt, the same for all rows; what an answer leaves over is filled up and never read."""
    texts: tuple[str, ...]
    """The answers as text."""


def with_generated(model: Lvlm, batch: Batch, steps: int) -> Continued:
    """Let the model answer, greedily and at most so many tokens, and return the inputs with what it said.

    The token that ends an answer is no part of it: a row that ends early has fewer steps, one that ends at once has none.
    """
    answers = greedy(model, batch, steps)
    return _continued(model, batch, answers)


def with_answers(model: Lvlm, batch: Batch) -> Continued:
    """Return the inputs with each example's true answer put after its prompt.

    Raises
    ------
    DataError
        Where an answer is empty, or unknown to the tokenizer.
    """
    tokenizer = model.processor.tokenizer
    answers = []
    for encoding in batch.encodings:
        ids = answer_tokens(model, encoding.example.question, encoding.example.answer)
        if not ids or tokenizer.unk_token_id in ids:
            msg = (
                f"example '{encoding.example.id}': its answer '{encoding.example.answer}' has no tokens of {model.name}"
            )
            raise DataError(msg)
        answers.append(ids)
    return _continued(model, batch, answers)


def _continued(model: Lvlm, batch: Batch, answers: Sequence[list[int]]) -> Continued:
    extra = max(len(a) for a in answers)
    tokenizer = model.processor.tokenizer
    fill = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    ids = batch.inputs[name]
    rows = [[*a, *[fill] * (extra - len(a))] for a in answers]
    inputs = dict(batch.inputs)
    length = ids.shape[1]
    inputs[name] = torch.cat([ids, torch.tensor(rows, device=ids.device, dtype=ids.dtype)], dim=1)
    if not model.encoder_decoder:
        for other, value in _AFTER_PROMPT.items():
            if other in inputs:
                old = inputs[other]
                mark = value if other != "token_type_ids" or not model.spec.token_types else 0
                inputs[other] = torch.cat([old, old.new_full((len(old), extra), mark)], dim=1)
        if "cross_attention_mask" in inputs:
            mask = inputs["cross_attention_mask"]
            inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, extra, -1, -1)], dim=1)
    maps = tuple(
        replace(e.tokens, generated=tuple(range(length, length + len(a))))
        for e, a in zip(batch.encodings, answers, strict=True)
    )
    texts: list[Any] = [tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]
    return Continued(inputs, maps, extra, tuple(texts))


def goes_on_with(tokens: Sequence[str], generate: int) -> GoesOn:
    """Say what follows the prompt, by what is to be read; raises `ConfigError` for what does not go together."""
    names = [tokens] if isinstance(tokens, str) else tokens
    roles = {TokenSelection.parse(t).role for t in names}
    if generate < 0:
        msg = f"generate={generate}: give the most tokens of an answer, or 0"
        raise ConfigError(msg)
    if generate and "answer" in roles:
        msg = (
            "the model's own answer (generate) and the true one ('answer:…') cannot follow one prompt: trace them apart"
        )
        raise ConfigError(msg)
    if generate:
        return "generated"
    if "answer" in roles and "generated" not in roles:
        return "answer"
    return ""
