"""The lines of an evaluation card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from groundscope.core.statistics import Estimate

ALL, NO_LEVEL = "all", "no level"


@dataclass(frozen=True)
class CardRow:
    """Wrong answers of one model on one benchmark, at one level and in one kind of task.

    Examples
    --------
    >>> from behavior.card import CardRow
    >>> from groundscope.core.statistics import Estimate
    >>> row = CardRow("a model", "pope", "object", "yes/no", 10, Estimate(0.2, 0.1, 0.4, 10), {}, None, 1)
    >>> row.frequency.value
    0.2
    """

    model: str
    benchmark: str
    level: str
    """``all``, a level, or ``no level``."""
    task: str
    """``all``, or one of `behavior.benchmarks.TASKS`."""
    n: int
    """Answers that are right or wrong; one description counts once."""
    frequency: Estimate
    """Share of wrong answers; of descriptions, the share with something invented."""
    severity: Mapping[str, Estimate]
    """Profile to the weight of wrong answers divided by the weight of all: sum w wrong / sum w."""
    yes_ratio: Estimate | None
    """Share of yes among answers to yes-no questions; None without such questions."""
    unparsed: int
    """Answers that match no candidate."""


@dataclass(frozen=True)
class CardFigure:
    """A figure of a benchmark, by its released rule.

    Examples
    --------
    >>> from behavior.card import CardFigure
    >>> from groundscope.core.statistics import Estimate
    >>> CardFigure("a model", "pope", "random", "f1", Estimate(0.9, 0.8, 1.0, 30)).part
    'random'
    """

    model: str
    benchmark: str
    part: str
    figure: str
    value: Estimate


@dataclass(frozen=True)
class CardDifference:
    """The paired difference between two models on the questions that both answered: second minus first.

    Examples
    --------
    >>> from behavior.card import CardDifference
    >>> from groundscope.core.statistics import Estimate
    >>> CardDifference("a", "b", "pope", "object", "uniform", Estimate(-0.1, -0.2, -0.01, 40)).significant
    True
    """

    first: str
    second: str
    benchmark: str
    """A benchmark, or ``all``: every question of every common benchmark."""
    level: str
    profile: str
    """Profile by which wrong answers are weighted; ``uniform`` is the frequency."""
    difference: Estimate

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclass(frozen=True)
class ModelFacts:
    """What a card states of one model on one benchmark besides its wrong answers.

    Examples
    --------
    >>> from behavior.card import ModelFacts
    >>> ModelFacts("a model", "pope", answers=10, missing=2).seconds_per_answer is None
    True
    """

    model: str
    benchmark: str
    answers: int
    missing: int = 0
    """Questions without an answer; they are in no figure."""
    seconds_per_answer: float | None = None
    """Wall time in seconds; None for answers from files without times."""
    forwards_per_answer: float | None = None
    rates: Mapping[str, Estimate] = field(default_factory=dict)
    """Symptoms (`behavior.card.symptoms`), ``refused`` and ``unsafe`` from verdicts, and the rates of `behavior.card.reword`."""
    variant: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardAnswer:
    """One judged answer, from which the rows are computed.

    Examples
    --------
    >>> from behavior.card import CardAnswer
    >>> CardAnswer("a model", "pope", "q1", "1.jpg", "object", "existence", "yes/no", True, "yes", False).wrong
    False
    """

    model: str
    benchmark: str
    id: str
    group: str
    level: str
    kind: str
    task: str
    correct: bool
    given: str | None
    unparsed: bool

    @property
    def wrong(self) -> bool:
        """Whether the answer is wrong."""
        return not self.correct
