"""Answer keys: which tokens a candidate answer starts with, and by how much the model prefers the true one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concepts.schema import Example
from groundscope.core.errors import DataError
from lvlm.model import Lvlm


@dataclass(frozen=True)
class AnswerKey:
    """Candidate answers of one question and the first tokens they can begin with."""

    candidates: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    """For each candidate the ids of its first token, as written and capitalised."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return a log-score for each candidate from logits ``[..., V]`` -> ``[..., n_candidates]``.

        A candidate that can begin in two ways (``yes``, ``Yes``) scores the log of the sum of both.
        """
        return torch.stack([logits[..., list(ids)].logsumexp(-1) for ids in self.tokens], dim=-1)

    def margin(self, logits: Tensor, answer: str) -> Tensor:
        """Return the score of `answer` minus the best other score: positive where the model would give it."""
        scores = self.scores(logits)
        right = self.candidates.index(answer)
        others = [i for i in range(len(self.candidates)) if i != right]
        return scores[..., right] - scores[..., others].amax(-1)


def answer_key(model: Lvlm, example: Example) -> AnswerKey:
    """Return the key of an example's question.

    Raises
    ------
    DataError
        Where a candidate is unknown to the tokenizer or two candidates begin with the same token.
    """
    if example.answer not in example.candidates:
        msg = (
            f"example '{example.id}': answer '{example.answer}' is not one of {', '.join(example.candidates) or 'any'}"
        )
        raise DataError(msg)
    # The end of the prompt decides how an answer goes on; of the question, only its last word can be part of that.
    last_word = " ".join(example.question.split()[-1:])
    tokenizer = model.processor.tokenizer
    template = str(getattr(model.processor, "chat_template", None))
    key = ("answer key", example.candidates, last_word, tokenizer, len(tokenizer), template, model.placeholder)
    return model.remember(key, lambda: _key(model, example.candidates, last_word))


def _key(model: Lvlm, candidates: tuple[str, ...], question: str) -> AnswerKey:
    tokens = tuple(_first_tokens(model, question, c) for c in candidates)
    owner: dict[int, str] = {}
    for candidate, ids in zip(candidates, tokens, strict=True):
        if not ids:
            msg = f"answer '{candidate}': the tokenizer of {model.name} does not know its first word"
            raise DataError(msg)
        for i in ids:
            if owner.setdefault(i, candidate) != candidate:
                msg = (
                    f"answers '{owner[i]}' and '{candidate}' begin with the same token: they cannot be told apart by it"
                )
                raise DataError(msg)
    return AnswerKey(candidates, tokens)


def _first_tokens(model: Lvlm, question: str, candidate: str) -> tuple[int, ...]:
    """Return the tokens a candidate begins with right after the prompt."""
    unknown = model.processor.tokenizer.unk_token_id
    found: list[int] = []
    for form in dict.fromkeys((candidate, candidate[:1].upper() + candidate[1:])):
        ids = answer_tokens(model, question, form)
        if ids and ids[0] != unknown and ids[0] not in found:
            found.append(ids[0])
    return tuple(found)


def answer_tokens(model: Lvlm, question: str, answer: str) -> list[int]:
    """Return the tokens of an answer as they follow the model's prompt.

    The tokenizer reads the prompt with the answer behind it, and what comes after the prompt's own tokens is the answer.
    A space stands between the two unless the prompt ends in white space or in a token that is no text (``<sep>``). The
    decoder of an encoder-decoder sees no prompt; there the answer is read by itself.

    Parameters
    ----------
    model
        The model that would answer.
    question
        What it is asked, or the end of it.
    answer
        As it would be written.
    """
    tokenizer = model.processor.tokenizer

    def read(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if model.encoder_decoder:
        return read(answer)
    prompt = model.prompt(question)
    before = read(prompt)
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    close = prompt[-1:].isspace() or not before or before[-1] in marks
    both = read(prompt + answer if close else f"{prompt} {answer}")
    # A prompt that ends in a space of its own may have it drawn into the answer's first token; the model is given the
    # prompt as it is, and goes on without that space.
    return both[len(before) :] if both[: len(before)] == before else read(answer)
