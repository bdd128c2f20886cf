"""ReVisiT: multiply the distribution by that of the image token that is nearest to it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lvlm.decoding.decoder import AnswerRule, RuleDecoder, Step
from mitigation.training_free.lens import (
    at_least_float32,
    block_outputs,
    lens,
    reverse_jensen_shannon,
)
from mitigation.training_free.method import (
    Category,
    TrainingFree,
    Variant,
    check_choice,
    check_image_tokens,
    check_range,
)
from mitigation.training_free.plausibility import plausible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lvlm.decoding.decoder import Branch, Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class ReVisiT(TrainingFree):
    """Refer to the image tokens of the prompt: each has a distribution over words, by the logit lens of the last layer.

    Candidates are the tokens with at least `beta` times the largest probability. Restricted to the candidates and
    renormalized, the distribution ``p_k`` of the image token k that is nearest to p by Jensen-Shannon divergence is
    selected, and the next token is chosen from ``log p + log p_k``. The final norm is applied once. arXiv 2506.09522.

    ``variant="release"`` (github.com/bscho333/ReVisiT) selects the image token by the divergences of the mean
    distribution from each of the two, averaged over the candidates; the rest is equal.

    The logits of all image tokens stay in memory while an answer is written: ``n V`` numbers for each answer, 74 MB in
    float32 for 576 tokens and 32,000 words.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.revisit import ReVisiT
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with ReVisiT().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "ReVisiT"
    category: ClassVar[Category] = "layers"
    source: ClassVar[str] = "arXiv 2506.09522"

    beta: float = 1e-5
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, 1)
        check_choice("variant", self.variant, ("paper", "release"))

    def _check(self, model: Lvlm) -> None:
        check_image_tokens(model, self.label)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self)


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: ReVisiT

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.method, model)


class _Rule(AnswerRule):
    def __init__(self, method: ReVisiT, model: Lvlm) -> None:
        self._method, self._model = method, model
        self.image_sites = block_outputs([model.n_layers - 1])
        self._image: list[Tensor] = []

    def branches(self, first: Step) -> Sequence[Branch]:
        (site,) = self.image_sites
        self._image = [lens(self._model, x) for x in first.image_activations[str(site)]]
        return ()

    def select(self, parents: Sequence[int]) -> None:
        self._image = [self._image[parent] for parent in parents]

    def combine(self, step: Step) -> Tensor:
        logits = at_least_float32(step.logits)
        rows = zip(logits, self._image, strict=True)
        return torch.stack([with_image_token(x, image, self._method.beta, self._method.variant) for x, image in rows])


def with_image_token(logits: Tensor, image: Tensor, beta: float, variant: Variant) -> Tensor:
    """Return ReVisiT's scores from logits ``[V]`` and those of image tokens ``[n, V]``; without any, the logits."""
    if not len(image):
        return logits
    candidates = plausible(logits, beta)
    p = logits[candidates].log_softmax(-1)
    inside = image.to(p)
    inside = inside if bool(candidates.all()) else inside[:, candidates.to(image.device)]
    if variant == "paper":
        nearest = inside[divergences(p, inside).argmin()].log_softmax(-1)
    else:
        by_token = inside.log_softmax(-1)
        nearest = by_token[reverse_jensen_shannon(p, by_token).argmin()]
    return torch.full_like(logits, -math.inf).masked_scatter(candidates, p + nearest)


def divergences(log_p: Tensor, logits: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergences of p, given as log-probabilities ``[V]``, from ``softmax(logits)``, ``[n, V]``.

    ``H(m) - (H(p) + H(q)) / 2`` with ``m = (p + q) / 2``: one logarithm for each number, where `jensen_shannon` has three.
    """
    q = logits.softmax(-1)
    p = log_p.exp()
    negative_entropy = torch.linalg.vecdot(q, logits) - logits.logsumexp(-1)
    m = q.add_(p).mul_(0.5)
    mixed = torch.linalg.vecdot(m, m.clamp_min(torch.finfo(m.dtype).tiny).log_())
    return (negative_entropy + torch.dot(p, log_p)) / 2 - mixed
