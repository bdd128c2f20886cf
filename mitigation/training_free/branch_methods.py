"""Methods that choose the next token by the logits of the prompt and of its branches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lvlm.decoding.decoder import AnswerRule, Branch, RuleDecoder, Step
from mitigation.training_free.method import TrainingFree

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class BranchMethod(TrainingFree):
    """A method with a rule for logits; subclasses override `_combine`, and `_branches` if the rule compares with some.

    `_start` returns what the rule needs for each answer, which `_branches` and `_combine` receive as ``state``.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import groundscope as gs
    >>> from mitigation.training_free.branch_methods import BranchMethod
    >>> @dataclass(frozen=True)
    ... class Halved(BranchMethod):
    ...     def _combine(self, step, state):
    ...         return step.logits / 2
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with Halved().applied(model):
    ...     answers = gs.answer(model, data)
    >>> round(answers.answers[0].margin / gs.answer(model, data).answers[0].margin, 3)
    0.5
    """

    @property
    def _neutral(self) -> bool:
        """Whether the parameters leave the model's own answers unchanged."""
        return False

    def _start(self, model: Lvlm, batch: Batch) -> Sequence[Any] | None:
        """Return what the rule needs for each answer of a batch, such as its candidates."""
        return None

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        """Return the branches of a batch of prompts."""
        return ()

    def _combine(self, step: Step, state: Any) -> Tensor:
        """Return the logits that the next token of each answer is chosen from, ``[B, V]``."""
        return step.logits

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return None if self._neutral else BranchDecoder(self)


@dataclass(frozen=True)
class BranchDecoder(RuleDecoder):
    """Decodes with the rule of a method."""

    method: BranchMethod

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        """Return the rule for a batch of answers."""
        return BranchRule(self.method, model, batch)


class BranchRule(AnswerRule):
    """The rule of a method for one batch of answers."""

    independent = True

    def __init__(self, method: BranchMethod, model: Lvlm, batch: Batch) -> None:
        self.method, self.model, self.batch = method, model, batch
        self.state = method._start(model, batch)

    def branches(self, first: Step) -> Sequence[Branch]:
        """Return the branches of the method."""
        return self.method._branches(self.model, self.batch, self.state)

    def combine(self, step: Step) -> Tensor:
        """Return the logits of the method."""
        return self.method._combine(step, self.state)

    def select(self, parents: Sequence[int]) -> None:
        """Follow other answers."""
        self.state = None if self.state is None else tuple(self.state[parent] for parent in parents)
