"""Extend inputs past the prompt, with the model's own answer or with the true answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from groundscope.core.errors import ConfigError, DataError
from lvlm.answer_keys import answer_tokens
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.generation import greedy
from lvlm.model import Batch, Lvlm
from lvlm.token_map import TokenMap
from lvlm.token_selection import TokenSelection

Continuation = Literal["", "generated", "answer"]
"""What follows the prompt: nothing, the model's own answer, or the true one."""


@dataclass(frozen=True)
class ContinuedBatch:
    """A batch whose rows continue after the prompt."""

    inputs: dict[str, Tensor]
    tokens: tuple[TokenMap, ...]
    """Token maps that include the tokens of the answers."""
    extra: int
    """Number of positions after the prompt, the same for all rows; shorter answers are padded, and padding is never read."""
    texts: tuple[str, ...]
    """The answers as text."""


def append_generated(model: Lvlm, batch: Batch, steps: int) -> ContinuedBatch:
    """Decode an answer of at most `steps` tokens greedily, and return the inputs with the answers appended.

    An answer excludes its end token: a row that ends early has fewer tokens, one that ends at once has none.
    """
    answers = greedy(model, batch.inputs, steps, images=batch.images)
    return _append_tokens(model, batch, answers)


def append_answers(model: Lvlm, batch: Batch) -> ContinuedBatch:
    """Return the inputs with each example's true answer appended to its prompt and prefix.

    Raises
    ------
    DataError
        If an answer is empty, or contains unknown tokens.
    """
    tokenizer = model.processor.tokenizer
    answers = []
    for encoding in batch.encodings:
        ids = answer_tokens(model, encoding.example, encoding.example.answer)
        if not ids or tokenizer.unk_token_id in ids:
            msg = (
                f"example '{encoding.example.id}': the tokenizer of {model.name} cannot encode its answer "
                f"'{encoding.example.answer}'; use another answer, or leave the example out"
            )
            raise DataError(msg)
        answers.append(ids)
    return _append_tokens(model, batch, answers)


def _append_tokens(model: Lvlm, batch: Batch, answers: Sequence[list[int]]) -> ContinuedBatch:
    extra = max(len(a) for a in answers)
    tokenizer = model.processor.tokenizer
    fill = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    rows = [[*a, *[fill] * (extra - len(a))] for a in answers]
    inputs = append_tokens(model, batch.inputs, rows)
    length = batch.inputs[name].shape[1]
    maps = tuple(
        replace(e.tokens, generated=tuple(range(length, length + len(a))))
        for e, a in zip(batch.encodings, answers, strict=True)
    )
    texts: list[Any] = [tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]
    return ContinuedBatch(inputs, maps, extra, tuple(texts))


def choose_continuation(tokens: Sequence[str], generate: int) -> Continuation:
    """Return what follows the prompt for the requested token selections; raise `ConfigError` if they conflict."""
    names = [tokens] if isinstance(tokens, str) else tokens
    roles = {TokenSelection.parse(t).role for t in names}
    if generate < 0:
        msg = f"generate={generate} must be at least 0 (the maximum number of tokens of an answer)"
        raise ConfigError(msg)
    if generate and "answer" in roles:
        msg = (
            "the model's own answer (generate) and the true answer ('answer:…') cannot follow the same prompt; "
            "trace them into separate stores"
        )
        raise ConfigError(msg)
    if generate:
        return "generated"
    if "answer" in roles and "generated" not in roles:
        return "answer"
    return ""
