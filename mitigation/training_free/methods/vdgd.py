"""VDGD: among likely tokens, choose those that the model's description of the image predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lvlm.decoding.decoder import AnswerRule, Step
from lvlm.generation import end_tokens
from mitigation.protocol import ForwardCost
from mitigation.training_free.method import Category, Regime, Variant, check_choice, check_range
from mitigation.training_free.prompt_methods import PromptMethod, text_of, write_about_images
from mitigation.training_free.prompt_words import words_problem

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Lvlm

PROMPT = "Describe the image in detail."
TEMPLATE = "The input image is described as follows: {description} {question}"
"""Prompt of the release for the answer."""
Reduction = Literal["min", "avg"]


@dataclass(frozen=True)
class VDGD(PromptMethod):
    """Visual description grounded decoding: score likely tokens by how well the model's description of the image predicts them.

    The model describes the image (greedy, once for each image of a batch); the question is asked after the description.
    Candidates are the nucleus `top_p` at `temperature`. With the next-token distributions ``p_j`` along the description, the
    score of a candidate v is minus the divergence of a certain v from them: ``max_j log p_j(v)``, or with ``reduction="avg"``
    ``mean_j log p_j(v)``. The next token has the largest score, and under sampling it is drawn from the softmax of the scores, as
    in the release. Ghosh et al. 2025, arXiv 2405.15683. The distributions are those that choose the tokens of the description,
    without the one that ends it.

    ``variant="release"`` divides the divergences by the size of the vocabulary, as the release does by a misplaced reduction; the
    scores then differ so little that sampling is nearly uniform over the candidates. The release scores with ``min`` in its code
    and ``avg`` in its instructions. Its prompt for the description is not part of the code, and `prompt` is ours.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.vdgd import VDGD
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> method = VDGD(prompt="Describe the image.", template="the image shows {description} {question}", max_new_tokens=20)
    >>> with method.applied(model):
    ...     answers = gs.answer(model, data, generate=True)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "VDGD"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2405.15683"
    regime: ClassVar[Regime] = "sampling"

    reduction: Reduction = "min"
    """How the divergences from the distributions along the description are combined."""
    top_p: float = 0.5
    """Probability of the nucleus; in (0, 1]."""
    temperature: float = 0.5
    """Temperature at which the nucleus is found; above 0."""
    prompt: str = PROMPT
    """Question that the description answers."""
    template: str = TEMPLATE
    """Prompt of the answer, with ``{description}`` and ``{question}``."""
    max_new_tokens: int = 512
    """Largest number of tokens of the description; at least 1."""
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, ("min", "avg"))
        check_range("top_p", self.top_p, 0, 1, above=True)
        check_range("temperature", self.temperature, 0, above=True)
        check_range("max_new_tokens", self.max_new_tokens, 1)
        check_choice("variant", self.variant, ("paper", "release"))

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes: a description."""
        return ForwardCost(prompts=1, written_tokens=self.max_new_tokens)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return the words of the prompts that the tokenizer does not know, if there are some."""
        return words_problem(model, f"{self.prompt} {self.template.format(description='', question='')}")

    def _prepared(self, model: Lvlm, examples: Sequence[Example]) -> tuple[Sequence[Example], AnswerRule]:
        along = _AlongDescription(end_tokens(model) | {model.content_id}, average=self.reduction == "avg")
        texts = write_about_images(model, examples, self.prompt, self.max_new_tokens, read=along)
        rewritten = [
            replace(e, question=self.template.format(description=text_of(model, tokens), question=e.question))
            for e, (_, tokens) in zip(examples, texts, strict=True)
        ]
        scores = along.scores()[[number for number, _ in texts]]
        return rewritten, _Rule(self, scores / scores.shape[-1] if self.variant == "release" else scores)


class _AlongDescription(AnswerRule):
    """Maximum or mean of the log-probabilities of every token along texts that end before an end token."""

    def __init__(self, ends: frozenset[int], *, average: bool) -> None:
        self._ends, self._average = ends, average
        self._total: Tensor | None = None
        self._count = 0
        self._running: Tensor | None = None

    def combine(self, step: Step) -> Tensor:
        log_p = step.logits.log_softmax(-1)
        if self._running is None or self._total is None:
            self._running = torch.ones(len(log_p), dtype=torch.bool, device=log_p.device)
            self._total = torch.zeros_like(log_p) if self._average else torch.full_like(log_p, -math.inf)
            self._counts = torch.zeros(len(log_p), 1, dtype=log_p.dtype, device=log_p.device)
        chosen = log_p.argmax(-1)
        ends = torch.tensor(sorted(self._ends), dtype=chosen.dtype, device=chosen.device)
        self._running = self._running & ~torch.isin(chosen, ends)
        total = self._total + log_p if self._average else self._total.maximum(log_p)
        self._total = torch.where(self._running[:, None], total, self._total)
        self._counts += self._running[:, None]
        return step.logits

    def scores(self) -> Tensor:
        """Return the scores of all tokens for each text, ``[n, V]``; all 0 for an empty text."""
        if self._total is None:
            msg = "no step was read"
            raise RuntimeError(msg)
        scores = self._total / self._counts if self._average else self._total
        return torch.where(self._counts > 0, scores, torch.zeros_like(scores))


class _Rule(AnswerRule):
    def __init__(self, method: VDGD, scores: Tensor) -> None:
        self._method, self._scores = method, scores

    def combine(self, step: Step) -> Tensor:
        allowed = nucleus(step.logits / self._method.temperature, self._method.top_p)
        return self._scores.masked_fill(~allowed, -math.inf)

    def select(self, parents: Sequence[int]) -> None:
        self._scores = self._scores[list(parents)]


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return which tokens belong to the smallest set with probability `top_p`, bool like `logits` ``[..., V]``.

    A token belongs to it if the more likely tokens have less than `top_p` together.

    Examples
    --------
    >>> import torch
    >>> from mitigation.training_free.methods.vdgd import nucleus
    >>> nucleus(torch.tensor([0.2, 0.5, 0.3]).log(), 0.6).tolist()
    [False, True, True]
    """
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < top_p)
