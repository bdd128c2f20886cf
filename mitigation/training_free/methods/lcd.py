"""LCD: contrast with the answer without the image, weighted by how certain that answer is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.branches import check_runs_without_image, without_image
from mitigation.training_free.method import Category, Regime, check_range
from mitigation.training_free.plausibility import plausible

if TYPE_CHECKING:
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class LCD(BranchMethod):
    """Language contrastive decoding: subtract the log-probabilities without the image, more so where they are certain.

    The next token is chosen from ``(1 + w) log p - w log p'`` among tokens with at least `beta` times the largest probability;
    ``p'`` are the probabilities without the image, ``w = alpha / H(p')`` with the entropy ``H`` in nats, without a bound (an
    entropy below the resolution of the logits' type counts as that resolution). Manevich and Tsarfaty 2024, arXiv 2408.04664.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.lcd import LCD
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with LCD().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "LCD"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2408.04664"
    regime: ClassVar[Regime] = "greedy"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 2.0
    """Weight of the contrast at an entropy of 1 nat; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)

    @property
    def _neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def _check(self, model: Lvlm) -> None:
        check_runs_without_image(model, self.label)

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        return [without_image(model, batch)]

    def _combine(self, step: Step, state: Any) -> Tensor:
        log_p, log_blind = (x.float() if x.dtype.itemsize < 4 else x for x in (step.logits, step.branches[0]))
        log_p, log_blind = log_p.log_softmax(-1), log_blind.log_softmax(-1)
        entropy = -(log_blind.exp() * log_blind).sum(-1, keepdim=True)
        weight = self.alpha / entropy.clamp_min(torch.finfo(entropy.dtype).eps)
        return (log_p + weight * (log_p - log_blind)).masked_fill(~plausible(step.logits, self.beta), -math.inf)
