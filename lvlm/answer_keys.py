"""Answer keys: the first tokens of candidate answers, and the score of each candidate from the logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concepts.schema import Example
from groundscope.core.errors import DataError
from lvlm.encoding.tokens_after_prompt import prefix_tokens, tokens_after, tokens_after_prefix
from lvlm.model import Lvlm


@dataclass(frozen=True)
class AnswerKey:
    """Candidate answers of a question, and the tokens that they can begin with.

    Examples
    --------
    >>> import torch
    >>> from lvlm import AnswerKey
    >>> key = AnswerKey(("yes", "no"), ((0, 1), (2,)))
    >>> logits = torch.tensor([0.0, 0.0, 1.0])
    >>> [round(float(s), 3) for s in key.scores(logits)]  # log(exp(0) + exp(0)), 1
    [0.693, 1.0]
    >>> round(float(key.margin(logits, "yes")), 3)
    -0.307
    """

    candidates: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    """For each candidate the ids of its first token, after the prompt and the prefix: as written, and capitalized."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return the score of each candidate from logits ``[..., V]`` -> ``[..., n_candidates]``.

        The score of a candidate with two first tokens (``yes``, ``Yes``) is the logarithm of their summed exponentials.
        """
        return torch.stack([logits[..., list(ids)].logsumexp(-1) for ids in self.tokens], dim=-1)

    def margin(self, logits: Tensor, answer: str) -> Tensor:
        """Return the score of `answer` minus the largest other score: positive if the model prefers it."""
        scores = self.scores(logits)
        right = self.candidates.index(answer)
        others = [i for i in range(len(self.candidates)) if i != right]
        return scores[..., right] - scores[..., others].amax(-1)


def answer_key(model: Lvlm, example: Example) -> AnswerKey:
    """Return the answer key of an example's question.

    Raises
    ------
    DataError
        If the answer is not a candidate, the tokenizer does not know a candidate, two candidates begin with the same token, or
        a candidate does not start a token after the example's prefix.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> example = next(e for e in gs.scenes.dataset(10, seed=0) if e.kind == "existence")
    >>> key = gs.answer_key(model, example)
    >>> key.candidates
    ('yes', 'no')
    """
    if example.answer not in example.candidates:
        msg = (
            f"example '{example.id}': answer '{example.answer}' is not one of {', '.join(example.candidates) or 'any'}"
        )
        raise DataError(msg)
    # Tokens of an answer depend on the end of the prompt and on the prefix; of the question, on its last word at most.
    end = replace(example, question=" ".join(example.request.split()[-1:]), suffix="", system=None)
    tokenizer = model.processor.tokenizer
    template = str(getattr(model.processor, "chat_template", None))
    context = (end.question, end.prefix, tokenizer, len(tokenizer), template, model.placeholder)
    key = ("answer key", example.candidates, *context)
    return model.remember(key, lambda: _key(model, end))


def _key(model: Lvlm, example: Example) -> AnswerKey:
    tokens = tuple(_first_tokens(model, example, c) for c in example.candidates)
    owner: dict[int, str] = {}
    for candidate, ids in zip(example.candidates, tokens, strict=True):
        if not ids:
            msg = (
                f"answer '{candidate}': its first word is unknown to the tokenizer of {model.name}; use another answer"
            )
            raise DataError(msg)
        for i in ids:
            if owner.setdefault(i, candidate) != candidate:
                msg = (
                    f"answers '{owner[i]}' and '{candidate}' begin with the same token, which cannot distinguish them; use "
                    "answers with different first tokens, or compare whole texts: behavior.answer(…, score='text_per_token'), "
                    "in a run evaluate.score=text_per_token"
                )
                raise DataError(msg)
    return AnswerKey(example.candidates, tokens)


def _first_tokens(model: Lvlm, example: Example, candidate: str) -> tuple[int, ...]:
    """Return the first tokens of a candidate after prompt and prefix, as written and capitalized."""
    unknown = model.processor.tokenizer.unk_token_id
    first: list[int] = []
    for form in dict.fromkeys((candidate, candidate[:1].upper() + candidate[1:])):
        try:
            ids = answer_tokens(model, example, form)
        except DataError:
            if form == candidate:
                raise
            continue
        if ids and ids[0] != unknown and ids[0] not in first:
            first.append(ids[0])
    return tuple(first)


def answer_tokens(model: Lvlm, example: Example, answer: str) -> list[int]:
    """Return the tokens of an answer to an example's question, after the prompt and the example's prefix.

    They are the tokens that the whole text has there (`lvlm.encoding.tokens_after_prompt`): for most tokenizers the first one
    includes the space before the word.

    Parameters
    ----------
    model
        The model.
    example
        The example, of which the question and the prefix are used.
    answer
        The answer.

    Raises
    ------
    DataError
        If the answer does not start a token after the prefix.
    """
    prompt = model.prompt(example.request) if not model.encoder_decoder else ""
    if not example.prefix:
        return list(tokens_after(model, prompt, answer).ids)
    ids = tokens_after_prefix(model, prompt, example.prefix, answer)
    if not ids and answer:
        msg = (
            f"example '{example.id}': '{answer}' does not start a token after the prefix '{example.prefix}' for the tokenizer of "
            f"{model.name}; end the prefix before the whole word"
        )
        raise DataError(msg)
    return list(ids)


def check_prefixes(model: Lvlm, examples: Iterable[Example]) -> None:
    """Raise `DataError`, which names the example, if a prefix is white space or has tokens that are not text."""
    for example in examples:
        if example.prefix:
            prefix_tokens(model, model.prompt(example.request), example.prefix, example.id)
