"""Classify wrong answers by level and kind, with their frequency and severity.

The three levels are those of Shu et al. (arXiv 2501.01346): object, attribute, relation. Frequency is a rate with an
interval clustered by image; severity is a weight that the user chooses: missing a pedestrian matters more than a wrong hue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from behavior.comparison import Comparison, change_estimate, compare, same_questions
from behavior.result import Answer, BehaviorResult, Cost
from concepts.concept import LEVELS
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

Severity = Mapping[str, float] | Callable[[Answer], float]
"""Weight from 0 to 1 of a wrong answer: by kind, otherwise by level, otherwise 1; or a function of the answer."""

SEVERITY: Mapping[str, float] = MappingProxyType({"object": 1.0, "relation": 0.5, "attribute": 0.25})
"""Default weights, which are an assumption; replace them by what each error costs your application."""
ALL = "all"


@dataclass(frozen=True)
class Share:
    """Wrong answers of one level, of one kind within a level, or of all questions.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("q1", "image 1", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> answers = gs.BehaviorResult((gs.Answer(*about, given="no", correct=False),), gs.Cost(None, None, 1))
    >>> share = gs.behavior.taxonomy.tabulate(answers, {"object": 0.5}).get("object", "existence")
    >>> share.frequency.value, share.severity.value, share.harm.value
    (1.0, 0.5, 0.5)
    """

    level: str
    """One of `concepts.concept.LEVELS`, or ``all``."""
    kind: str
    """Kind of the questions, or ``all``."""
    n: int
    """Number of questions with candidates."""
    frequency: Estimate
    """Share of questions with a wrong answer."""
    severity: Estimate
    """Mean weight of a wrong answer; NaN if no answer is wrong."""
    harm: Estimate
    """Weight of wrong answers per question: frequency times severity."""
    unparsed: int
    """Answers that match none of the candidates; they count as wrong."""


@dataclass(frozen=True)
class Taxonomy:
    """Frequency, severity and harm of a system's wrong answers, and the cost of its answers.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("q1", "image 1", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> answers = gs.BehaviorResult((gs.Answer(*about, given="no", correct=False),), gs.Cost(None, None, 1))
    >>> table = gs.behavior.taxonomy.tabulate(answers)
    >>> table.frame()[["level", "kind", "n", "frequency"]].values.tolist()
    [['all', 'all', 1, 1.0], ['object', 'all', 1, 1.0], ['object', 'existence', 1, 1.0]]
    """

    shares: tuple[Share, ...]
    """All questions, then each level of the data followed by its kinds."""
    cost: Cost
    weights: Mapping[str, float]
    """The severity used: ``level/kind`` to the mean weight that its answers would have if wrong."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def get(self, level: str = ALL, kind: str = ALL) -> Share:
        """Return one share; raises `ConfigError` for a level or kind without questions."""
        for share in self.shares:
            if (share.level, share.kind) == (level, kind):
                return share
        msg = f"no questions of {level}/{kind}; choose from {', '.join(f'{s.level}/{s.kind}' for s in self.shares)}"
        raise ConfigError(msg)

    def frame(self) -> pd.DataFrame:
        """Return one row per share: each figure with ``<figure>_low`` and ``<figure>_high``, and the cost per answer."""
        import pandas as pd

        rows = []
        for share in self.shares:
            row: dict[str, object] = {
                "level": share.level,
                "kind": share.kind,
                "n": share.n,
                "unparsed": share.unparsed,
            }
            for name in ("frequency", "severity", "harm"):
                figure: Estimate = getattr(share, name)
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            row |= {
                "seconds_per_answer": self.cost.seconds_per_answer,
                "forwards_per_answer": self.cost.forwards_per_answer,
            }
            rows.append(row)
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Change:
    """Difference in one level's wrong answers between two systems on the same questions.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("q1", "image 1", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> before, after = (
    ...     gs.BehaviorResult((gs.Answer(*about, given, given == "yes"),), gs.Cost(None, None, 1)) for given in ("no", "yes")
    ... )
    >>> change = gs.behavior.taxonomy.compare_systems(before, after)[0]
    >>> change.level, change.accuracy.difference.value, change.harm.value
    ('all', 1.0, -1.0)
    """

    level: str
    accuracy: Comparison
    """Shares of correct answers, with an exact test and an interval of the difference."""
    harm: Estimate
    """Paired difference (second minus first) of the weight of wrong answers per question, interval clustered by image."""


def tabulate(answers: BehaviorResult, severity: Severity = SEVERITY) -> Taxonomy:
    """Tabulate the wrong answers of a system by level and kind.

    Parameters
    ----------
    answers
        Answers to questions with candidates; free text has no single true answer and is ignored.
    severity
        Weights of wrong answers.

    Raises
    ------
    DataError
        If no question has candidates.
    ConfigError
        For a weight that is not between 0 and 1.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("neutral", "attribute", "what_color", "What color is the cat?", "black", ("black", "white"))
    >>> given = ["black", "white", "white", "black"]
    >>> rows = [gs.Answer(f"q{i}", f"image {i}", *about, color, color == "black") for i, color in enumerate(given)]
    >>> answers = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 4))
    >>> share = gs.behavior.taxonomy.tabulate(answers).get("attribute")
    >>> share.frequency.value, share.harm.value
    (0.5, 0.125)
    """
    weigh = _weight_function(severity)
    rows = [a for a in answers.answers if a.correct is not None]
    if not rows:
        msg = "no question has candidates, so no answer is correct or wrong; give questions with candidates"
        raise DataError(msg)
    shares = [_share(ALL, ALL, rows, weigh)]
    for level in LEVELS:
        level_rows = [a for a in rows if a.level == level]
        if level_rows:
            kinds = dict.fromkeys(a.kind for a in level_rows)
            shares.append(_share(level, ALL, level_rows, weigh))
            shares += [_share(level, kind, [a for a in level_rows if a.kind == kind], weigh) for kind in kinds]
    weights_of_kind: dict[str, list[float]] = {}
    for row in rows:
        weights_of_kind.setdefault(f"{row.level}/{row.kind}", []).append(weigh(row))
    return Taxonomy(
        tuple(shares), answers.cost, {name: float(np.mean(values)) for name, values in weights_of_kind.items()}
    )


def compare_systems(first: BehaviorResult, second: BehaviorResult, severity: Severity = SEVERITY) -> tuple[Change, ...]:
    """Compare two systems' wrong answers to the same questions: over all questions, then for each level of the data.

    Parameters
    ----------
    first, second
        Answers to the same questions, in any order.
    severity
        Weights of wrong answers; the same for both systems.

    Raises
    ------
    DataError
        If the questions differ, or no question has candidates.
    ConfigError
        For a weight that is not between 0 and 1.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("q1", "image 1", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> before, after = (
    ...     gs.BehaviorResult((gs.Answer(*about, given, given == "yes"),), gs.Cost(None, None, 1)) for given in ("no", "yes")
    ... )
    >>> [(change.level, change.harm.value) for change in gs.behavior.taxonomy.compare_systems(before, after)]
    [('all', -1.0), ('object', -1.0)]
    """
    weigh = _weight_function(severity)
    differences: list[Change] = []
    for level in (ALL, *LEVELS):
        before, after = (r if level == ALL else r.where(level=level) for r in (first, second))
        pairs = [(a, b) for a, b in same_questions(before, after) if a.correct is not None and b.correct is not None]
        if not pairs and level != ALL:
            continue
        accuracy = compare(before, after)
        harm_change = np.array(
            [weigh(b) * (not b.correct) - weigh(a) * (not a.correct) for a, b in pairs], dtype=np.float64
        )
        differences.append(Change(level, accuracy, change_estimate(harm_change, [a.group for a, _ in pairs])))
    return tuple(differences)


def changes_frame(changes: tuple[Change, ...]) -> pd.DataFrame:
    """Return one row per level of a comparison.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("q1", "image 1", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> answers = gs.BehaviorResult((gs.Answer(*about, given="no", correct=False),), gs.Cost(None, None, 1))
    >>> changes = gs.behavior.taxonomy.compare_systems(answers, answers)
    >>> gs.behavior.taxonomy.changes_frame(changes)[["level", "harm"]].values.tolist()
    [['all', 0.0], ['object', 0.0]]
    """
    import pandas as pd

    rows = []
    for change in changes:
        accuracy = asdict(change.accuracy)
        difference = accuracy.pop("difference")
        rows.append(
            {
                "level": change.level,
                **accuracy,
                **{f"difference_{key}": value for key, value in difference.items()},
                "harm": change.harm.value,
                "harm_low": change.harm.low,
                "harm_high": change.harm.high,
            }
        )
    return pd.DataFrame(rows)


def _weight_function(severity: Severity) -> Callable[[Answer], float]:
    def weigh(row: Answer) -> float:
        weight = severity(row) if callable(severity) else severity.get(row.kind, severity.get(row.level, 1.0))
        if not 0 <= weight <= 1:  # also refuses NaN
            msg = f"severity of question '{row.id}' ({row.level}, {row.kind}) is {weight}; give a weight from 0 to 1"
            raise ConfigError(msg)
        return float(weight)

    return weigh


def _share(level: str, kind: str, rows: list[Answer], weigh: Callable[[Answer], float]) -> Share:
    groups = [a.group for a in rows]
    wrong = [not a.correct for a in rows]
    weights = [weigh(a) * w for a, w in zip(rows, wrong, strict=True)]
    return Share(
        level=level,
        kind=kind,
        n=len(rows),
        frequency=estimate(wrong, groups),
        severity=estimate(weights, groups, wrong),
        harm=estimate(weights, groups),
        unparsed=sum(a.given is None for a in rows),
    )
