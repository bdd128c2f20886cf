"""ICD: contrast with the answer under a disturbing instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.branches import with_examples
from mitigation.training_free.method import Category, Regime, check_choice, check_range
from mitigation.training_free.plausibility import contrast
from mitigation.training_free.prompt_words import words_problem

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

Place = Literal["system", "after image"]
SYSTEM = "You are a confused objects detector to provide a fuzzy overview or impression of the image."
"""System prompt of the release."""
AFTER_IMAGE = "You are a confused object detector."
"""Sentence after the image in the code of SID (arXiv 2408.02032)."""


@dataclass(frozen=True)
class ICD(BranchMethod):
    """Instruction contrastive decoding: subtract the logits that the model has under a disturbing instruction.

    The next token is chosen from ``(1 + alpha) l - alpha l'`` among tokens with at least `beta` times the largest probability,
    where ``l'`` are the logits with the instruction. Wang et al. 2024, arXiv 2403.18715. The release replaces the system prompt
    of LLaVA by the instruction. For chat templates without a system prompt, and to share the prefix up to the image, `place`
    puts the instruction after the image, before the question, as the code of SID does; published figures of the two forms are
    not comparable.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.icd import ICD
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> print(ICD(place="after image").problem(model, data[0]))
    not applicable: 4 prompt words unknown (You, are, confused, detector)
    >>> with ICD(place="after image", instruction="Please do not see the image.").applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "ICD"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2403.18715"
    regime: ClassVar[Regime] = "sampling"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 1.0
    """Weight of the contrast; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    place: Place = "system"
    """Where the instruction is: it replaces the system prompt, or follows the image."""
    instruction: str | None = None
    """The instruction; None for the published one of the place (`SYSTEM`, `AFTER_IMAGE`)."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        check_choice("place", self.place, ("system", "after image"))

    @property
    def text(self) -> str:
        """The disturbing instruction."""
        return self.instruction or (SYSTEM if self.place == "system" else AFTER_IMAGE)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return the words of the instruction that the tokenizer does not know, if there are some."""
        return words_problem(model, self.text)

    @property
    def _neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def _check(self, model: Lvlm) -> None:
        if self.place != "system":
            return
        try:
            model.prompt("question", 1, system=self.text)
        except ModelError as error:
            msg = f"ICD replaces the system prompt, and the prompts of {model.name} have none ({error}); use place='after image'"
            raise ModelError(msg) from error

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        return [with_examples(model, batch, "disturbing instruction", self._disturbed)]

    def _disturbed(self, example: Example) -> Example:
        if self.place == "system":
            return replace(example, system=self.text)
        return replace(example, question=f"{self.text} {example.question}")

    def _combine(self, step: Step, state: Any) -> Tensor:
        return contrast(step.logits, step.branches[0], self.alpha, self.beta)
