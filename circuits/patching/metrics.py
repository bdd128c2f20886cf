"""Metrics of patching: how strongly a model prefers an answer, computed from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError, DataError, PatchError
from lvlm.answer_keys import AnswerKey, answer_key
from lvlm.model import Lvlm

MetricName = Literal["logit_difference", "probability", "log_probability", "kl"]
LEAST = {"logit_difference": 0.5, "probability": 0.05, "log_probability": 0.5, "kl": 0.05}
"""Default `min_effect` by metric: least difference between the clean and the corrupt run of a pair."""


class MetricInput(Protocol):
    """Properties of a pair that a metric needs."""

    @property
    def pair(self) -> CounterfactualPair:
        """The pair."""
        ...

    @property
    def key(self) -> AnswerKey | None:
        """Key that distinguishes the two answers by their first tokens."""
        ...

    @property
    def answer(self) -> tuple[int, ...]:
        """Tokens of the clean answer."""
        ...


@dataclass(frozen=True)
class Metric:
    """A metric M of the logits of a run, one number per pair.

    ``logit_difference``
        log-odds of the clean image's answer against the corrupt image's answer;
    ``probability``
        probability of the clean answer's first token, over the full vocabulary;
    ``log_probability``
        log-probability of all tokens of the clean answer (teacher forcing), in nats;
    ``kl``
        minus the divergence KL(clean run || this run) of the next-token distribution, in nats: 0 in the clean run.

    Each metric is larger in the clean run than in the corrupt run if the model distinguishes the images, so the share
    ``(M_patched - M_corrupt) / (M_clean - M_corrupt)`` has the same meaning for all.
    """

    name: MetricName = "logit_difference"

    def __post_init__(self) -> None:
        if self.name not in LEAST:
            msg = f"unknown metric '{self.name}'; choose from {', '.join(LEAST)}"
            raise ConfigError(msg)

    @property
    def needs_key(self) -> bool:
        """Whether the first tokens of the two answers must differ."""
        return self.name in {"logit_difference", "probability"}

    def keep(self, answer: int) -> int:
        """Return the number of last positions with logits, for an appended answer of `answer` tokens."""
        return answer + 1

    def scores(self, logits: Tensor, pairs: Sequence[MetricInput], clean: Tensor) -> np.ndarray:
        """Return M of runs of some pairs.

        Parameters
        ----------
        logits
            Logits at the last `keep` positions, ``[P, n, keep, V]``.
        pairs
            The P pairs.
        clean
            Logits of their clean runs, ``[P, keep, V]``.

        Returns
        -------
        numpy.ndarray
            float32 ``[P, n]``.
        """
        rows = zip(logits, pairs, clean, strict=True)
        return np.stack([self._of_pair(x, pair, own).float().cpu().numpy() for x, pair, own in rows])

    def _of_pair(self, logits: Tensor, pair: MetricInput, clean: Tensor) -> Tensor:
        right, wrong = pair.pair.clean.answer, pair.pair.corrupt.answer
        if self.name == "log_probability":
            tokens = torch.tensor(pair.answer, device=logits.device)
            log_probabilities = logits[:, : len(pair.answer)].float().log_softmax(-1)  # [n, A, V]
            return log_probabilities.gather(-1, tokens.expand(len(log_probabilities), -1)[..., None])[..., 0].sum(-1)
        if self.name == "kl":
            here, there = logits[:, -1].float().log_softmax(-1), clean[-1].float().log_softmax(-1)
            return -(there.exp() * (there - here)).sum(-1)
        if pair.key is None:
            msg = f"pair '{pair.pair.clean.id}' has no answer key, which metric '{self.name}' needs"
            raise PatchError(msg)
        if self.name == "probability":
            return probability(logits[:, -1], pair.key, right)
        return logit_difference(logits[:, -1], pair.key, right, wrong)


def pair_key(model: Lvlm, pair: CounterfactualPair) -> AnswerKey:
    """Return the key of a pair's two true answers: the clean answer, then the corrupt answer.

    Raises
    ------
    PatchError
        If both have the same true answer, or the two answers begin with the same token, so that logits at one position
        cannot distinguish them.
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

    A score is the log of the summed exponentials of a candidate's first tokens, so the difference is the log-odds of one
    answer against the other; with one token each, it is the logit difference.
    """
    scores = key.scores(logits.float())
    return scores[..., key.candidates.index(right)] - scores[..., key.candidates.index(wrong)]


def probability(logits: Tensor, key: AnswerKey, answer: str) -> Tensor:
    """Return the probability of an answer's first tokens, over the full vocabulary, ``[..., V]`` -> float32 ``[...]``."""
    logits = logits.float()
    return (key.scores(logits)[..., key.candidates.index(answer)] - logits.logsumexp(-1)).exp()
