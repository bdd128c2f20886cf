"""Log-probabilities of answers, and the losses of preference tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from groundscope.core.errors import DataError
from lvlm.answer_keys import answer_tokens
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.encoding.encode import Encoding, Inputs
from lvlm.generation import end_tokens
from lvlm.model import Lvlm
from mitigation.preference.pair import PreferencePair


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the loss of direct preference optimization for each pair, ``[B]``.

    ``-log sigmoid(beta ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))))`` (Rafailov et al. 2023,
    arXiv 2305.18290, equation 7).

    Parameters
    ----------
    policy, reference
        Log-probabilities of the chosen and the rejected answers, ``[B, 2]``: of the tuned model, and of the model before.
    beta
        Strength of the constraint to the reference.
    """
    rewards = beta * (policy - reference)
    return -functional.logsigmoid(rewards[:, 0] - rewards[:, 1])


def sft_loss(policy: Tensor) -> Tensor:
    """Return the negative log-probability of the chosen answer of each pair, ``[B]``."""
    return -policy[:, 0]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Prompts of equal shape, each once with its chosen and once with its rejected answer."""

    inputs: Inputs
    """Model inputs of 2 B rows: all chosen, then all rejected answers."""
    answers: Tensor
    """Token ids ``[2 B, T]``, padded at the end."""
    mask: Tensor
    """Which tokens are of the answer, bool ``[2 B, T]``."""
    index: tuple[int, ...]
    """Index of each pair."""

    def log_probabilities(self, model: Lvlm) -> Tensor:
        """Return the log-probabilities of both answers including the end token, ``[B, 2]``, with gradients if enabled."""
        length = self.answers.shape[1]
        logits = model.forward(self.inputs, keep=length + 1)[:, :-1].float()
        tokens = self.answers.to(logits.device)
        each = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return (each * self.mask.to(each)).sum(-1).view(2, -1).T


def check_answers(model: Lvlm, pairs: Sequence[PreferencePair]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of both answers of each pair, with the end token.

    Raises
    ------
    DataError
        For an answer with words that the tokenizer does not know, or two answers with equal tokens.
    """
    end = sorted(end_tokens(model))[:1]
    unknown = model.processor.tokenizer.unk_token_id
    tokens = []
    for pair in pairs:
        example = pair.example()
        both = tuple([*answer_tokens(model, example, text), *end] for text in (pair.chosen, pair.rejected))
        if unknown is not None and any(unknown in ids for ids in both):
            msg = f"preference '{pair.id}': the tokenizer of {model.name} does not know all words of its answers; leave it out"
            raise DataError(msg)
        if both[0] == both[1]:
            msg = f"preference '{pair.id}': the tokenizer of {model.name} gives both answers the same tokens; leave it out"
            raise DataError(msg)
        tokens.append((both[0], both[1]))
    return tokens


def pair_batch(
    model: Lvlm, encodings: Sequence[Encoding], tokens: Sequence[tuple[list[int], list[int]]], index: Sequence[int]
) -> PairBatch:
    """Return a batch of pairs whose prompts have equal shapes."""
    rows = [both[side] for side in (0, 1) for both in tokens]
    longest = max(map(len, rows))
    padded = [row + [row[-1]] * (longest - len(row)) for row in rows]
    inputs = append_tokens(model, model.collate([*encodings, *encodings]), padded)
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    return PairBatch(inputs, torch.tensor(padded), mask, tuple(index))
