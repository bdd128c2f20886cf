"""What a patch is measured by: how strongly a model prefers an answer, read from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError, DataError, PatchError
from lvlm.answers import AnswerKey, answer_key
from lvlm.model import Lvlm

MetricName = Literal["logit_difference", "probability", "log_probability", "kl"]
LEAST = {"logit_difference": 0.5, "probability": 0.05, "log_probability": 0.5, "kl": 0.05}
"""Least difference between clean and corrupt run of the pairs that are kept, where nothing else is said."""


class Asked(Protocol):
    """What a metric has to know of a pair."""

    @property
    def pair(self) -> CounterfactualPair:
        """The pair itself."""
        ...

    @property
    def key(self) -> AnswerKey | None:
        """What tells its two answers apart at their first tokens."""
        ...

    @property
    def answer(self) -> tuple[int, ...]:
        """Tokens of the clean answer."""
        ...


@dataclass(frozen=True)
class Metric:
    """What is read of the logits of a run, one number M for each pair.

    ``logit_difference``
        log-odds of the clean image's answer against the corrupt image's;
    ``probability``
        that the clean answer begins, over the whole vocabulary;
    ``log_probability``
        of all tokens of the clean answer, each given those before it (teacher forcing), in nats;
    ``kl``
        minus the divergence KL(clean run || this run) of the next token's distribution, in nats: 0 in the clean run.

    Each is larger in the clean run than in the corrupt one where the model tells the images apart, so that the share
    ``(M_patched - M_corrupt) / (M_clean - M_corrupt)`` means the same for all.
    """

    name: MetricName = "logit_difference"

    def __post_init__(self) -> None:
        if self.name not in LEAST:
            msg = f"metric='{self.name}': choose {', '.join(LEAST)}"
            raise ConfigError(msg)

    @property
    def needs_key(self) -> bool:
        """Whether the two answers must be told apart by their first tokens."""
        return self.name in {"logit_difference", "probability"}

    def keep(self, answer: int) -> int:
        """Return at how many of the last positions logits are read, for an answer of so many tokens put there."""
        return answer + 1

    def scores(self, logits: Tensor, pairs: Sequence[Asked], clean: Tensor) -> np.ndarray:
        """Return M of runs of some pairs.

        Parameters
        ----------
        logits
            At the positions kept, ``[P, n, kept, V]``.
        pairs
            P of them.
        clean
            Logits of their clean runs, ``[P, kept, V]``.

        Returns
        -------
        numpy.ndarray
            float32 ``[P, n]``.
        """
        rows = zip(logits, pairs, clean, strict=True)
        return np.stack([self._of_pair(x, pair, own).float().cpu().numpy() for x, pair, own in rows])

    def _of_pair(self, logits: Tensor, pair: Asked, clean: Tensor) -> Tensor:
        right, wrong = pair.pair.clean.answer, pair.pair.corrupt.answer
        if self.name == "log_probability":
            tokens = torch.tensor(pair.answer, device=logits.device)
            told = logits[:, : len(pair.answer)].float().log_softmax(-1)  # [n, A, V]
            return told.gather(-1, tokens.expand(len(told), -1)[..., None])[..., 0].sum(-1)
        if self.name == "kl":
            here, there = logits[:, -1].float().log_softmax(-1), clean[-1].float().log_softmax(-1)
            return -(there.exp() * (there - here)).sum(-1)
        if pair.key is None:
            msg = f"pair '{pair.pair.clean.id}': metric '{self.name}' needs the answers' first tokens"
            raise PatchError(msg)
        if self.name == "probability":
            return probability(logits[:, -1], pair.key, right)
        return logit_difference(logits[:, -1], pair.key, right, wrong)


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
