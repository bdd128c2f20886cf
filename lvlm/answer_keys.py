"""Answer keys: the first tokens of candidate answers, and the score of each candidate from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concepts.schema import Example
from groundscope.core.errors import DataError
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
    """For each candidate the ids of its first token: as written, and capitalized."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return the log-score of each candidate from logits ``[..., V]`` -> ``[..., n_candidates]``.

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
        If the answer is not a candidate, the tokenizer does not know a candidate, or two candidates begin with the same token.

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
    # Tokens of an answer depend on the end of the prompt; of the question, on its last word at most.
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
            msg = (
                f"answer '{candidate}': its first word is unknown to the tokenizer of {model.name}; use another answer"
            )
            raise DataError(msg)
        for i in ids:
            if owner.setdefault(i, candidate) != candidate:
                msg = (
                    f"answers '{owner[i]}' and '{candidate}' begin with the same token, which cannot distinguish them; use "
                    "answers with different first tokens"
                )
                raise DataError(msg)
    return AnswerKey(candidates, tokens)


def _first_tokens(model: Lvlm, question: str, candidate: str) -> tuple[int, ...]:
    """Return the first tokens of a candidate after the prompt, as written and capitalized."""
    unknown = model.processor.tokenizer.unk_token_id
    first: list[int] = []
    for form in dict.fromkeys((candidate, candidate[:1].upper() + candidate[1:])):
        ids = answer_tokens(model, question, form)
        if ids and ids[0] != unknown and ids[0] not in first:
            first.append(ids[0])
    return tuple(first)


def answer_tokens(model: Lvlm, question: str, answer: str) -> list[int]:
    """Return the tokens of an answer after the model's prompt.

    Prompt and answer are tokenized together; the tokens after those of the prompt are the answer's. They are separated by a space
    unless the prompt ends in white space or in a token that is not text (``<sep>``). The decoder of an encoder-decoder receives
    no prompt, so its answer is tokenized alone.

    Parameters
    ----------
    model
        The model.
    question
        The question, or its end.
    answer
        The answer.
    """
    tokenizer = model.processor.tokenizer

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if model.encoder_decoder:
        return tokenize(answer)
    prompt = model.prompt(question)
    before = tokenize(prompt)
    not_text = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    adjacent = prompt[-1:].isspace() or not before or before[-1] in not_text
    both = tokenize(prompt + answer if adjacent else f"{prompt} {answer}")
    # The tokenizer may merge a space at the end of the prompt into the answer's first token; the model reads the prompt alone
    # and continues without that space.
    return both[len(before) :] if both[: len(before)] == before else tokenize(answer)
