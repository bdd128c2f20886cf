"""M3ID: contrast with the answer without the image, more so the longer the answer is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.branches import check_runs_without_image, without_image
from mitigation.training_free.method import Category, Regime, check_choice, check_range
from mitigation.training_free.plausibility import plausible

if TYPE_CHECKING:
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

M3IDVariant = Literal["paper", "avisc", "ritual"]
"""The paper's rule, or that of its re-implementations in the releases of AvisC and RITUAL; M3ID itself has no release."""
_BETA = 0.1


@dataclass(frozen=True)
class M3ID(BranchMethod):
    """Multi-modal mutual information decoding: add the evidence of the image, which fades as the answer becomes longer.

    The next token is chosen from ``log p + 1[max p < threshold] (1 - g) / g (log p - log p')``, where ``p'`` are the
    probabilities without the image, ``g = exp(-decay (t + offset))`` and t is the number of the token, from 1. Tokens are not
    restricted. Favero et al. 2024, arXiv 2403.14003. The authors published no code; the rule is that of the paper as quoted by
    others, and `offset` has no published value.

    Variants: ``avisc`` is the code of AvisC (arXiv 2405.17820): the same weight whatever the confidence, tokens with at least
    0.1 times the largest probability, t from 1. ``ritual`` is the code of RITUAL (arXiv 2405.17821) and of ONLY: the same with t
    from 0, so the first token, and any answer of one token, is that of the model alone among these tokens.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.m3id import M3ID
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with M3ID().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "M3ID"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2403.14003"
    regime: ClassVar[Regime] = "greedy"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    decay: float = 0.02
    """Rate at which the image is forgotten, per token; at least 0, 0 leaves the model's own answers (variant ``paper``)."""
    offset: float = 0.0
    """Number added to that of the token; at least 0."""
    threshold: float = 0.3
    """Largest probability from which on the model's own logits are used (variant ``paper``); in [0, 1]."""
    variant: M3IDVariant = "paper"

    def __post_init__(self) -> None:
        check_range("decay", self.decay, 0, 1)
        check_range("offset", self.offset, 0)
        check_range("threshold", self.threshold, 0, 1)
        check_choice("variant", self.variant, ("paper", "avisc", "ritual"))

    @property
    def _neutral(self) -> bool:
        return self.variant == "paper" and (self.decay == 0 or self.threshold == 0)

    def _check(self, model: Lvlm) -> None:
        check_runs_without_image(model, self.label)

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        return [without_image(model, batch)]

    def _combine(self, step: Step, state: Any) -> Tensor:
        log_p, log_blind = step.logits.log_softmax(-1), step.branches[0].log_softmax(-1)
        number = step.number + (self.variant != "ritual")
        weight = math.expm1(min(self.decay * (number + self.offset), 700.0))  # (1 - g) / g, without overflow
        gain = weight * (log_p - log_blind)
        if self.variant == "paper":
            unsure = step.logits.softmax(-1).amax(-1, keepdim=True) < self.threshold
            return torch.where(unsure, log_p + gain, log_p)
        return (log_p + gain).masked_fill(~plausible(step.logits, _BETA), -math.inf)
