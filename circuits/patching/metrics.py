"""Metrics of patching: how strongly a model prefers an answer, computed from its logits; an open table.

A metric M is larger in the clean run than in the corrupt run if the model distinguishes the images, so the share
``(M_patched - M_corrupt) / (M_clean - M_corrupt)`` has the same meaning for all metrics.

======================  ==================================================================================================
`metrics`               M
======================  ==================================================================================================
``logit_difference``    log-odds of the clean image's answer against the corrupt image's answer
``probability``         probability of the clean answer's first token, over the full vocabulary
``log_probability``     log-probability of all tokens of the clean answer (teacher forcing), in nats
``kl``                  minus the divergence KL(clean run || this run) of the next-token distribution, in nats
======================  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ConfigError, DataError, PatchError
from groundscope.core.registry import Registry
from lvlm.answer_keys import AnswerKey, answer_key
from lvlm.model import Lvlm

MetricFunction = Callable[[Tensor, CounterfactualPair], Tensor]
"""From logits ``[B, V]`` of B runs of a pair, at its last prompt token, in at least float32, to M of each run, ``[B]``.

Called once per pair and batch; for attribution it must be differentiable."""


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
    """A metric of the logits of a run, and what it needs.

    Exactly one of `at_last` and `of_runs` is set.
    """

    name: str
    at_last: Callable[[Tensor, MetricInput], Tensor] | None = None
    """M from the logits at the last position, ``[..., V]`` -> ``[...]``, differentiable."""
    of_runs: Callable[[Tensor, MetricInput, Tensor], Tensor] | None = None
    """M from the logits of n runs at the last positions, ``[n, keep, V]``, and those of the clean run ``[keep, V]``: ``[n]``."""
    min_effect: float = 0.0
    """Default least difference between the clean and the corrupt run of a pair, in units of the metric."""
    needs_key: bool = False
    """Whether the first tokens of the two answers must differ."""
    needs_answer: bool = False
    """Whether the clean answer is appended to the prompt."""

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

    @property
    def differentiable(self) -> bool:
        """Whether M is a function of one run's logits at the last position, as attribution needs."""
        return self.at_last is not None

    def of_last(self, logits: Tensor, pair: MetricInput) -> Tensor:
        """Return M from the logits at the last position, ``[..., V]`` -> ``[...]``; raise `ConfigError` if it needs more."""
        if self.at_last is None:
            raise ConfigError(self.problem_of_gradient())
        return self.at_last(logits, pair)

    def problem_of_gradient(self) -> str:
        """Return the message for a metric that attribution cannot use."""
        names = ", ".join(name for name in metrics.usable() if metric_of(name).differentiable)
        return (
            f"metric '{self.name}' needs several positions or the clean run, so it has no gradient here; choose from {names}, "
            "or pass a function of the logits at the last position"
        )

    def _of_pair(self, logits: Tensor, pair: MetricInput, clean: Tensor) -> Tensor:
        return self.of_last(logits[:, -1], pair) if self.of_runs is None else self.of_runs(logits, pair, clean)

    @property
    def provenance(self) -> dict[str, Any]:
        """The installed package that the metric comes from, if any."""
        origin = metrics.origins.get(self.name)
        return {} if origin is None else {"metric_package": origin}


def metric_of(metric: str | MetricFunction) -> Metric:
    """Return a metric by name, or of a function, which is named ``module.function``.

    Raises
    ------
    ConfigError
        If the name is unknown, or `metric` is neither a name nor a function.
    """
    if isinstance(metric, str):
        entry = metrics[metric]
        return entry if isinstance(entry, Metric) else _of_function(entry, metric)
    if not callable(metric):
        msg = (
            f"metric={metric!r} is neither a name nor a function; choose from {', '.join(metrics)}, or pass a function"
        )
        raise ConfigError(msg)
    kind = type(metric)
    name = getattr(metric, "__qualname__", kind.__qualname__)
    return _of_function(metric, f"{getattr(metric, '__module__', None) or kind.__module__}.{name}")


def gradient_metric(metric: str | MetricFunction) -> Metric:
    """Return a metric as `metric_of`; raise `ConfigError` if it is not a function of the logits at the last position."""
    chosen = metric_of(metric)
    if not chosen.differentiable:
        raise ConfigError(chosen.problem_of_gradient())
    return chosen


def _of_function(function: MetricFunction, name: str) -> Metric:
    def at_last(logits: Tensor, pair: MetricInput) -> Tensor:
        rows = logits if logits.dim() == 2 else logits[None]
        values = function(rows.float() if rows.element_size() < 4 else rows, pair.pair)
        if not isinstance(values, Tensor) or values.shape != rows.shape[:1] or not values.is_floating_point():
            received = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            msg = (
                f"metric '{name}' returned {received}; it must return one floating-point number per run, [{len(rows)}]"
            )
            raise PatchError(msg)
        return values if logits.dim() == 2 else values[0]

    return Metric(name, at_last)


def _logit_difference(logits: Tensor, item: MetricInput) -> Tensor:
    key = _key_of(item)
    return logit_difference(logits, key, *key.candidates[:2])


def _probability(logits: Tensor, item: MetricInput) -> Tensor:
    return probability(logits, _key_of(item), item.pair.clean.answer)


def _log_probability(logits: Tensor, item: MetricInput, _clean: Tensor) -> Tensor:
    tokens = torch.tensor(item.answer, device=logits.device)
    log_probabilities = logits[:, : len(item.answer)].float().log_softmax(-1)  # [n, A, V]
    return log_probabilities.gather(-1, tokens.expand(len(log_probabilities), -1)[..., None])[..., 0].sum(-1)


def _kl(logits: Tensor, _item: MetricInput, clean: Tensor) -> Tensor:
    here, there = logits[:, -1].float().log_softmax(-1), clean[-1].float().log_softmax(-1)
    return -(there.exp() * (there - here)).sum(-1)


def _key_of(item: MetricInput) -> AnswerKey:
    if item.key is None:
        msg = f"pair '{item.pair.clean.id}' has no key of its answers' first tokens, which this metric needs"
        raise PatchError(msg)
    return item.key


def _problem(entry: Metric | MetricFunction) -> str | None:
    return None if isinstance(entry, Metric) or callable(entry) else "it must be a function of logits [B, V] and a pair"


metrics: Registry[Metric | MetricFunction] = Registry(
    "metric",
    {
        "logit_difference": Metric("logit_difference", _logit_difference, min_effect=0.5, needs_key=True),
        "probability": Metric("probability", _probability, min_effect=0.05, needs_key=True),
        "log_probability": Metric("log_probability", of_runs=_log_probability, min_effect=0.5, needs_answer=True),
        "kl": Metric("kl", of_runs=_kl, min_effect=0.05),
    },
    group="groundscope.metrics",
    check=_problem,
)
"""Metrics by name. ``metrics.register("name", function)`` adds a `MetricFunction`; so does an installed package, by an
entry point in the group ``groundscope.metrics``."""


def pair_key(model: Lvlm, pair: CounterfactualPair) -> AnswerKey:
    """Return the key of a pair's two answers: the clean answer, then the corrupt answer, or for a placebo another candidate.

    Raises
    ------
    PatchError
        If both have the same true answer and the pair is no placebo, or the two answers begin with the same token, so that
        logits at one position cannot distinguish them.
    """
    right, wrong = pair.clean.answer, _other_answer(pair)
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


def _other_answer(pair: CounterfactualPair) -> str:
    """Return the corrupt example's answer; for a placebo the answer by prior, or the first candidate that is wrong."""
    if not pair.placebo or pair.corrupt.answer != pair.clean.answer:
        return pair.corrupt.answer
    others = [candidate for candidate in pair.clean.candidates if candidate != pair.clean.answer]
    if pair.clean.prior_answer in others:
        return pair.clean.prior_answer
    return others[0] if others else pair.corrupt.answer


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
