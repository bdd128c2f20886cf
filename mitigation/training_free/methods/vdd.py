"""VDD: contrast with the answer without the image, and its calibration of answers to questions with candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lvlm.answer_keys import answer_key
from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.branches import check_runs_without_image, unknown_image, unknown_token, without_image
from mitigation.training_free.method import Category, Regime, check_choice, check_image_tokens, check_range
from mitigation.training_free.plausibility import contrast

if TYPE_CHECKING:
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

Blind = Literal["no image", "unknown", "single unknown", "mean"]
"""Prompts without visual evidence: the image tokens removed, ``<unk>`` in place of each, one ``<unk>`` in place of all (LLaVA's
release, whose prompts have one token for an image before it is expanded), or the mean of the first two."""
FORMS: tuple[Blind, ...] = ("no image", "unknown", "single unknown", "mean")


def check_blind(model: Lvlm, label: str, form: Blind) -> None:
    """Raise `ModelError` if a model cannot answer a prompt of a form."""
    check_image_tokens(model, label)
    check_runs_without_image(model, label)
    if form != "no image":
        unknown_token(model)


def blind_branches(model: Lvlm, batch: Batch, form: Blind) -> list[Branch]:
    """Return the branches of a form: two for the mean, else one."""
    branches = [without_image(model, batch)] if form in ("no image", "mean") else []
    return branches if form == "no image" else [*branches, unknown_image(model, batch, single=form == "single unknown")]


@dataclass(frozen=True)
class VDD(BranchMethod):
    """Visual debias decoding: subtract the logits that the model has without the image.

    The next token is chosen from ``(1 + alpha) l - alpha l'`` among tokens with at least `beta` times the largest probability;
    ``l'`` are the logits of prompts of the form `blind`, for ``mean`` the mean of both logits. Zhang et al. 2024,
    arXiv 2403.05262. `VDDCalibration` is its correction of answers to questions with candidates.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.vdd import VDD
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with VDD(blind="mean").applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "VDD"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2403.05262"
    regime: ClassVar[Regime] = "sampling"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 1.0
    """Weight of the contrast; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    blind: Blind = "no image"
    """What replaces the image, one of `FORMS`."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        check_choice("blind", self.blind, FORMS)

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes: one more for each blind prompt."""
        branches = 2 if self.blind == "mean" else 1
        return ForwardCost(per_token=1 + branches, prompts=branches)

    @property
    def _neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def _check(self, model: Lvlm) -> None:
        check_blind(model, self.label, self.blind)

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        return blind_branches(model, batch, self.blind)

    def _combine(self, step: Step, state: Any) -> Tensor:
        return contrast(step.logits, torch.stack(step.branches).mean(0), self.alpha, self.beta)


Spelling = Literal["as written", "capitalized"]


@dataclass(frozen=True)
class VDDCalibration(BranchMethod):
    """VDD's calibration: divide each candidate's probability by its probability without the image, and renormalize.

    ``q(c) = p(c) / p'(c) / sum over candidates``, with probabilities of one token of each candidate under the softmax over the
    whole vocabulary; ``mean`` averages the probabilities of both blind prompts. It needs no labels: it removes the bias that the
    prompt without visual evidence shows. Only the first token of answers to questions with candidates is changed: other tokens
    than those of the candidates are excluded there, and questions without candidates are answered by the model alone. Zhang et
    al. 2024, arXiv 2403.05262.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.vdd import VDDCalibration
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with VDDCalibration().applied(model):
    ...     answer = gs.answer(model, data).answers[0]
    >>> round(sum(answer.probabilities), 6)
    1.0
    """

    label: ClassVar[str] = "VDD calibration"
    category: ClassVar[Category] = "post-hoc"
    source: ClassVar[str] = "arXiv 2403.05262"
    regime: ClassVar[Regime] = "greedy"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    blind: Blind = "no image"
    """What replaces the image, one of `FORMS`."""
    spelling: Spelling = "capitalized"
    """Which of a candidate's two first tokens is compared (``yes``, ``Yes``); if the tokenizer has only one, that one."""

    def __post_init__(self) -> None:
        check_choice("blind", self.blind, FORMS)
        check_choice("spelling", self.spelling, ("as written", "capitalized"))

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes: one more for each blind prompt."""
        branches = 2 if self.blind == "mean" else 1
        return ForwardCost(per_token=1 + branches, prompts=branches)

    def _check(self, model: Lvlm) -> None:
        check_blind(model, self.label, self.blind)

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        return blind_branches(model, batch, self.blind)

    def _start(self, model: Lvlm, batch: Batch) -> tuple[tuple[int, ...] | None, ...]:
        end = 0 if self.spelling == "as written" else -1
        examples = (encoding.example for encoding in batch.encodings)
        return tuple(
            tuple(ids[end] for ids in answer_key(model, example).tokens) if example.candidates else None
            for example in examples
        )

    def _combine(self, step: Step, state: tuple[tuple[int, ...] | None, ...]) -> Tensor:
        if step.number:
            return step.logits
        blind = torch.stack([x.log_softmax(-1) for x in step.branches]).logsumexp(0) - math.log(len(step.branches))
        ratio = step.logits.log_softmax(-1) - blind
        logits = step.logits.clone()
        for row, tokens in enumerate(state):
            if tokens is not None:
                logits[row] = -math.inf
                logits[row, list(tokens)] = ratio[row, list(tokens)].log_softmax(-1)
        return logits
