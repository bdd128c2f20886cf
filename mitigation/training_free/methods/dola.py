"""DoLa: contrast the last layer with the inner layer that differs most from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lvlm.decoding.decoder import AnswerRule, RuleDecoder, Step
from lvlm.family.specification import resolve
from mitigation.training_free.lens import (
    at_least_float32,
    check_blocks,
    check_depth,
    hidden_state_sites,
    jensen_shannon,
    lens,
    lens_without_norm,
    reverse_jensen_shannon,
    stacked,
)
from mitigation.training_free.method import Category, TrainingFree, Variant, check_choice, check_range
from mitigation.training_free.plausibility import plausible

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

Bucket = Literal["low", "high"]


@dataclass(frozen=True)
class DoLa(TrainingFree):
    """Decoding by contrasting layers: what the last layers add to the distribution of an inner, premature layer.

    The next token is chosen from ``log p_N - log p_j`` among tokens with at least `beta` times the largest probability,
    where ``p_j`` is the logit lens (final norm, then unembedding) of the premature layer j: of a bucket of layers the
    one with the largest Jensen-Shannon divergence from ``p_N``, for each answer and token separately. Chuang et al.
    2023, arXiv 2309.03883.

    ``variant="release"`` (github.com/voidism/DoLa) differs in four points: one layer is chosen for the whole batch, by
    the mean over its rows, so that an answer depends on its batch; the divergences are those of the mean distribution
    from each of the two, averaged over the vocabulary; premature logits have no final norm; and tokens of the prompt
    and the answer have a repetition penalty of 1.2, after the contrast.

    Buckets are those of transformers, as numbers of ``hidden_states`` (0 is the embedding): ``low`` is every second one
    below half of the depth N, ``high`` every second one from there on; above 40 layers below 20, and the last 20. They
    begin at 0, or at 2 if the unembedding is the embedding. A bucket that is empty in a shallow model is its first
    number (at most N - 1). The paper uses ``high`` for short answers and ``low`` for long ones.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.dola import DoLa
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with DoLa().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), DoLa().used_parameters(model)["layers"], DoLa(bucket="high").used_parameters(model)["layers"]
    (6, (0, 2), (3, 5))
    """

    label: ClassVar[str] = "DoLa"
    category: ClassVar[Category] = "layers"
    source: ClassVar[str] = "arXiv 2309.03883"

    bucket: Bucket = "low"
    """Premature layers: ``low`` or ``high``."""
    layers: tuple[int, ...] | None = None
    """Numbers of ``hidden_states`` to choose from, below the depth; None for those of `bucket`."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    repetition_penalty: float | None = None
    """Divides positive scores of earlier tokens and multiplies negative ones; None for 1, and for 1.2 in the
    release."""
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        check_choice("bucket", self.bucket, ("low", "high"))
        check_choice("variant", self.variant, ("paper", "release"))
        check_range("beta", self.beta, 0, 1)
        check_blocks(self.layers)
        if self.repetition_penalty is not None:
            check_range("repetition_penalty", self.repetition_penalty, 0, above=True)

    @property
    def penalty(self) -> float:
        """The repetition penalty that is used."""
        default = 1.2 if self.variant == "release" else 1.0
        return default if self.repetition_penalty is None else self.repetition_penalty

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the numbers of ``hidden_states`` and the penalty that are used."""
        return {**self.parameters, "layers": self._layers(model), "repetition_penalty": self.penalty}

    def _layers(self, model: Lvlm) -> tuple[int, ...]:
        return self.layers or bucket_layers(self.bucket, model.n_layers, tied=_tied(model))

    def _check(self, model: Lvlm) -> None:
        check_depth(self.layers, model.n_layers, self.label, model)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self)


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: DoLa

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.method, model, batch)


class _Rule(AnswerRule):
    def __init__(self, method: DoLa, model: Lvlm, batch: Batch) -> None:
        self._method, self._model = method, model
        self._prompt = batch.inputs["decoder_input_ids" if model.encoder_decoder else "input_ids"]
        self.sites = hidden_state_sites(method._layers(model))

    def select(self, parents: Sequence[int]) -> None:
        self._prompt = self._prompt[list(parents)]

    def combine(self, step: Step) -> Tensor:
        method = self._method
        unembed = lens if method.variant == "paper" else lens_without_norm
        logits = at_least_float32(step.logits)
        inner = unembed(self._model, stacked(step.activations, self.sites)).to(logits.device)
        scores = layer_contrast(logits, inner, method.beta, method.variant)
        if method.penalty == 1:
            return scores
        tokens = self._prompt if step.tokens is None else torch.cat([self._prompt, step.tokens], dim=1)
        return penalized(scores, tokens.to(scores.device), method.penalty)


def bucket_layers(bucket: Bucket, depth: int, *, tied: bool) -> tuple[int, ...]:
    """Return the premature layers of a bucket, as numbers of ``hidden_states``; never empty.

    Examples
    --------
    >>> from mitigation.training_free.methods.dola import bucket_layers
    >>> bucket_layers("low", 32, tied=False), bucket_layers("high", 48, tied=True)[:3]
    ((0, 2, 4, 6, 8, 10, 12, 14), (28, 30, 32))
    """
    start = 2 if tied else 0
    if bucket == "low":
        numbers = range(start, 20 if depth > 40 else depth // 2, 2)
    else:
        numbers = range(depth - 20 if depth > 40 else depth // 2, depth, 2)
    return tuple(numbers) or (min(start, depth - 1),)


def layer_contrast(logits: Tensor, inner: Tensor, beta: float, variant: Variant) -> Tensor:
    """Return DoLa's scores from the logits of the model ``[B, V]`` and of premature layers ``[B, layers, V]``."""
    last, premature = logits.log_softmax(-1), inner.log_softmax(-1)
    if variant == "paper":
        layer = jensen_shannon(last[:, None], premature).argmax(-1)
    else:
        layer = reverse_jensen_shannon(last[:, None], premature).mean(0).argmax(-1).expand(len(last))
    chosen = premature[torch.arange(len(last), device=last.device), layer]
    return (last - chosen).masked_fill(~plausible(last, beta), -math.inf)


def penalized(scores: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Return scores ``[B, V]``, divided by the penalty (if negative, multiplied) for the tokens int ``[B, T]``."""
    earlier = scores.gather(-1, tokens)
    return scores.scatter(-1, tokens, torch.where(earlier < 0, earlier * penalty, earlier / penalty))


def _tied(model: Lvlm) -> bool:
    """Whether the unembedding is the embedding of tokens."""
    unembedding = resolve(model.hf, model.spec.unembedding or "", model.spec)
    embedding = model.hf.get_input_embeddings()
    weights: Sequence[object] = [getattr(module, "weight", None) for module in (embedding, unembedding)]
    return weights[0] is not None and weights[0] is weights[1]
