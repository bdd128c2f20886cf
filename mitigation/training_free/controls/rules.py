"""Controls that change only how a token is chosen: greedy, plausibility alone, and a constant bias of yes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from torch import Tensor

from concepts.question import YES_NO
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError
from lvlm.answer_keys import answer_key
from lvlm.decoding.decoder import Step
from lvlm.generation import greedy
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.method import Category, TrainingFree, check_parameters, check_range
from mitigation.training_free.plausibility import plausible

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling
    from mitigation.method_data import DerivationData


@dataclass(frozen=True)
class Greedy(TrainingFree):
    """Control: the model's most likely tokens, even if the other rows of a table are sampled.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.rules import Greedy
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> plain = gs.answer(model, data, generate=True)
    >>> with Greedy().applied(model):
    ...     answers = gs.answer(model, data, generate=True, sampling=gs.Sampling(temperature=9.0))
    >>> answers.answers == plain.answers
    True
    """

    label: ClassVar[str] = "greedy"
    control: ClassVar[bool] = True

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _GreedyDecoder()


@dataclass(frozen=True)
class _GreedyDecoder:
    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        return model.logits(batch.inputs, batch.images)

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        return greedy(model, batch.inputs, max_new_tokens, images=batch.images)


@dataclass(frozen=True)
class APCOnly(BranchMethod):
    """Control: the adaptive plausibility constraint alone, with which contrastive methods restrict sampling.

    Tokens with less than `beta` times the largest probability are excluded. Greedy answers do not change; sampled ones become
    more like greedy ones, which explains a part of the published gains of contrastive methods (arXiv 2504.10020).

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.rules import APCOnly
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with APCOnly().applied(model):
    ...     answers = gs.answer(model, data, generate=True)
    >>> [a.text for a in answers.answers] == [a.text for a in gs.answer(model, data, generate=True).answers]
    True
    """

    label: ClassVar[str] = "APC only"
    source: ClassVar[str] = "arXiv 2210.15097"
    control: ClassVar[bool] = True

    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, 1)

    @property
    def _neutral(self) -> bool:
        return self.beta == 0

    def _combine(self, step: Step, state: Any) -> Tensor:
        return step.logits.masked_fill(~plausible(step.logits, self.beta), -math.inf)


@dataclass(frozen=True)
class YesNoBias(BranchMethod):
    """Control: a constant added to the logits of yes, chosen on validation questions.

    Contrastive methods shift how often a model says yes, and a constant does so too (arXiv 2504.10020). `derive` chooses the
    constant with the highest accuracy on the yes-no questions of the validation data (`choose_bias`); it is added to all first
    tokens of "yes" in yes-no questions, the same rule for every model, split and benchmark. Other questions are answered by the
    model alone.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.rules import YesNoBias
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20)
    >>> control = YesNoBias.derive(gs.DerivationData(model, None, data))
    >>> with control.applied(model):
    ...     biased = gs.answer(model, data)
    >>> biased.rate("accuracy").value >= gs.answer(model, data).rate("accuracy").value
    True
    """

    label: ClassVar[str] = "constant yes/no bias"
    category: ClassVar[Category] = "post-hoc"
    control: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("examples",)

    bias: float = 0.0
    """Constant in nats; negative favors no."""

    def __post_init__(self) -> None:
        if not isinstance(self.bias, int | float) or not math.isfinite(self.bias):
            msg = f"bias={self.bias}: must be a finite number"
            raise ConfigError(msg)

    @classmethod
    def derive(cls, data: DerivationData, **parameters: Any) -> Self:
        """Return the control with the bias of the highest accuracy on the yes-no questions of the data.

        Raises
        ------
        ConfigError
            For an unknown parameter.
        DataError
            If the data have no yes-no question.
        """
        from behavior import answer

        check_parameters(cls, parameters)
        if "bias" in parameters:
            return cls(**parameters)
        questions = ConceptDataset("validation", tuple(e for e in data.examples if set(e.candidates) == set(YES_NO)))
        if not len(questions):
            msg = "the bias of yes is chosen on yes-no questions, and the data have none"
            raise DataError(msg)
        answers = answer(data.model, questions, progress=False).answers
        truth = [a.answer == "yes" for a in answers]
        scores = [float(a.margin or 0) * (1 if yes else -1) for a, yes in zip(answers, truth, strict=True)]
        return cls(choose_bias(scores, truth))

    @property
    def _neutral(self) -> bool:
        return self.bias == 0

    def _start(self, model: Lvlm, batch: Batch) -> Sequence[tuple[int, ...]]:
        examples = [encoding.example for encoding in batch.encodings]
        return [_yes_tokens(model, e) if set(e.candidates) == set(YES_NO) else () for e in examples]

    def _combine(self, step: Step, state: Sequence[tuple[int, ...]]) -> Tensor:
        if step.number:
            return step.logits
        logits = step.logits.clone()
        for row, tokens in enumerate(state):
            logits[row, list(tokens)] += self.bias
        return logits


def _yes_tokens(model: Lvlm, example: Any) -> tuple[int, ...]:
    key = answer_key(model, example)
    return key.tokens[key.candidates.index("yes")]


def choose_bias(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """Return the constant which, added to scores of yes minus no, gives the highest accuracy; the smallest one if several do.

    Examples
    --------
    >>> from mitigation.training_free.controls.rules import choose_bias
    >>> choose_bias([3.0, 1.0, 0.5, -2.0], [True, True, False, False])
    -0.75
    """
    values, yes = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    levels = np.unique(values)
    thresholds = [0.0, *((levels[1:] + levels[:-1]) / 2), levels[0] - 1, levels[-1] + 1]
    # Equality counts as wrong for both answers, as in `behavior.answer`.
    right = [int(((values > t) & yes).sum() + ((values < t) & ~yes).sum()) for t in thresholds]
    best = max(range(len(thresholds)), key=lambda i: (right[i], -abs(thresholds[i])))
    return -float(thresholds[best]) or 0.0
