"""Extend inputs past the prompt, with the model's own answer or with the true answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError
from lvlm.answer_keys import answer_tokens
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.generation import greedy
from lvlm.model import Batch, Lvlm
from lvlm.token_map import TokenMap
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    from lvlm.decoding.prefix_run import PrefixBatch

Continuation = Literal["", "generated", "answer"]
"""What follows the prompt: nothing, the model's own answer, or the true one."""


@dataclass(frozen=True)
class ContinuedBatch:
    """A batch whose rows continue after the prompt."""

    inputs: dict[str, Tensor]
    """Empty for rows with shared prefixes, whose inputs are those of `rows` after them."""
    tokens: tuple[TokenMap, ...]
    """Token maps that include the tokens of the answers."""
    extra: int
    """Number of positions after the prompt, the same for all rows; shorter answers are padded, and padding is never read."""
    texts: tuple[str, ...]
    """The answers as text."""
    rows: tuple[tuple[int, ...], ...] = ()
    """The tokens of the answers, with their padding."""


def append_generated(model: Lvlm, batch: Batch | PrefixBatch, steps: int) -> ContinuedBatch:
    """Decode an answer of at most `steps` tokens greedily, and return the inputs with the answers appended.

    An answer excludes its end token: a row that ends early has fewer tokens, one that ends at once has none.
    """
    whole = isinstance(batch, Batch)
    answers = greedy(model, batch.inputs, steps, images=batch.images) if whole else batch.generate(steps)
    return _append_tokens(model, batch, answers)


def append_answers(model: Lvlm, batch: Batch | PrefixBatch) -> ContinuedBatch:
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


def longest_answer(model: Lvlm, examples: Sequence[Example]) -> int:
    """Return the largest number of tokens of the true answers."""
    return max(len(answer_tokens(model, e, e.answer)) for e in examples)


def _append_tokens(model: Lvlm, batch: Batch | PrefixBatch, answers: Sequence[list[int]]) -> ContinuedBatch:
    extra = max(len(a) for a in answers)
    tokenizer = model.processor.tokenizer
    fill = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    rows = [[*a, *[fill] * (extra - len(a))] for a in answers]
    inputs = append_tokens(model, batch.inputs, rows) if isinstance(batch, Batch) else {}
    maps = tuple(
        replace(e.tokens, generated=tuple(range(e.tokens.length, e.tokens.length + len(a))))
        for e, a in zip(batch.encodings, answers, strict=True)
    )
    texts: list[Any] = [tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]
    return ContinuedBatch(inputs, maps, extra, tuple(texts), tuple(map(tuple, rows)))


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
