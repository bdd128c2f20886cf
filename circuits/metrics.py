"""How strongly a model prefers one answer, read from the logits at the last position."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from concepts.errors import DataError, PatchError
from concepts.schema import CounterfactualPair
from lvlm.answers import AnswerKey, answer_key
from lvlm.model import Lvlm


def pair_key(model: Lvlm, pair: CounterfactualPair) -> AnswerKey:
    """Return the key of a pair's two true answers: first the clean one's, then the corrupt one's.

    Raises
    ------
    PatchError
        Where both have the same true answer, or the two answers begin with the same token: then no difference of
        logits at one position tells them apart.
    """
    right, wrong = pair.clean.answer, pair.corrupt.answer
    if right == wrong:
        msg = (
            f"pair '{pair.clean.id}' ({pair.change}): clean and corrupt have the same answer '{right}'; "
            "patching needs pairs whose true answers differ"
        )
        raise PatchError(msg)
    try:
        return answer_key(model, replace(pair.clean, candidates=(right, wrong)))
    except DataError as error:
        msg = f"pair '{pair.clean.id}' ({pair.change}): {error}"
        raise PatchError(msg) from error


def logit_difference(logits: Tensor, key: AnswerKey, right: str, wrong: str) -> Tensor:
    """Return the score of one candidate minus that of another, ``[..., V]`` -> float32 ``[...]``.

    A score is the log of the summed exponentials of a candidate's first tokens, so that the difference is the
    log-odds of the one answer against the other; with one token each it is the plain logit difference.
    """
    scores = key.scores(logits.float())
    return scores[..., key.candidates.index(right)] - scores[..., key.candidates.index(wrong)]


def probability(logits: Tensor, key: AnswerKey, answer: str) -> Tensor:
    """Return the probability, over the whole vocabulary, that an answer begins, ``[..., V]`` -> float32 ``[...]``."""
    logits = logits.float()
    return (key.scores(logits)[..., key.candidates.index(answer)] - logits.logsumexp(-1)).exp()
