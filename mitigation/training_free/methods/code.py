"""CODE: contrast with the answer to the model's own description in place of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.branches import check_runs_without_image, examples_of, replaced_image
from mitigation.training_free.method import Category, Regime, Variant, check_choice, check_image_tokens, check_range
from mitigation.training_free.prompt_methods import text_of, write_about_images
from mitigation.training_free.prompt_words import words_problem

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

PROMPT = (
    "Provide a detailed description of the image, covering all visible elements and their interactions, so as to thoroughly "
    "answer any potential questions about the image."
)
"""Prompt of the release for the description."""


@dataclass(frozen=True)
class CODE(BranchMethod):
    """Contrasting self-generated descriptions: subtract the logits for the model's description of the image in its place.

    With probabilities ``p`` and ``p'`` of the image and of the description, ``D = 1/2 sum (p + p') log2(|p - p'|^gamma + 1)``,
    in [0, 1], says how much they differ. The next token is chosen from ``(2 - D) l - (1 - D) l'`` among tokens with
    ``p >= D max p``. The description is greedy, and written once for each image of a batch; its tokens stand in place of all
    image tokens. Kim et al. 2024, arXiv 2406.01920; prompt and `gamma` are those of the release's scripts. The release's
    tokenizer puts the token that begins a text before the description; ``variant="release"`` does so too.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.code import CODE
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with CODE(prompt="Describe the image.", max_new_tokens=20).applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "CODE"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2406.01920"
    regime: ClassVar[Regime] = "greedy"

    gamma: float = 0.7
    """Exponent of the differences of probabilities; above 0."""
    prompt: str = PROMPT
    """Question that the description answers."""
    max_new_tokens: int = 512
    """Largest number of tokens of the description; at least 1."""
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0, above=True)
        check_range("max_new_tokens", self.max_new_tokens, 1)
        check_choice("variant", self.variant, ("paper", "release"))

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes: a description, and one more for each token of the answer."""
        return ForwardCost(per_token=2, prompts=2, written_tokens=self.max_new_tokens)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return the words of the description's prompt that the tokenizer does not know, if there are some."""
        return words_problem(model, self.prompt)

    def _check(self, model: Lvlm) -> None:
        check_image_tokens(model, self.label)
        check_runs_without_image(model, self.label)

    def _start(self, model: Lvlm, batch: Batch) -> Sequence[tuple[int, ...]]:
        texts = write_about_images(model, examples_of(batch, self.label), self.prompt, self.max_new_tokens)
        tokenizer, special = model.processor.tokenizer, self.variant == "release"
        return [
            tuple(tokenizer(text_of(model, tokens), add_special_tokens=special)["input_ids"]) for _, tokens in texts
        ]

    def _branches(self, model: Lvlm, batch: Batch, state: Sequence[tuple[int, ...]]) -> Sequence[Branch]:
        return [replaced_image(model, batch, "description", state, at="all images")]

    def _combine(self, step: Step, state: Sequence[tuple[int, ...]]) -> Tensor:
        logits, other = step.logits, step.branches[0]
        distance = bounded_divergence(logits.softmax(-1), other.softmax(-1), self.gamma)[..., None]
        # p >= D max p, in logits.
        threshold = distance.log() + logits.amax(-1, keepdim=True)
        return ((2 - distance) * logits - (1 - distance) * other).masked_fill(logits < threshold, -math.inf)


def bounded_divergence(p: Tensor, q: Tensor, gamma: float) -> Tensor:
    """Return ``1/2 sum (p + q) log2(|p - q|^gamma + 1)`` over the last axis: 0 for equal, 1 for disjoint certain distributions.

    Examples
    --------
    >>> import torch
    >>> from mitigation.training_free.methods.code import bounded_divergence
    >>> yes, no = torch.eye(2)
    >>> float(bounded_divergence(yes, yes, 0.7)), float(bounded_divergence(yes, no, 0.7))
    (0.0, 1.0)
    """
    return 0.5 * ((p + q) * torch.log2((p - q).abs() ** gamma + 1)).sum(-1)
