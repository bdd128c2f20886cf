"""Wrong answers by what they are about, how often they come, and how much they matter.

The three levels are those of Shu et al. (arXiv 2501.01346): object, attribute, relation. How often is a rate with its
interval clustered by image; how much is a weight that the user states: a pedestrian that was missed is not a wrong hue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from behavior.comparison import Comparison, change_estimate, compare, same_questions
from behavior.result import Answer, BehaviorResult, Cost
from concepts.schema import LEVELS
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

Severity = Mapping[str, float] | Callable[[Answer], float]
"""Weight from 0 to 1 of a wrong answer: by kind, else by level, else 1; or a function of the answer."""

SEVERITY: Mapping[str, float] = MappingProxyType({"object": 1.0, "relation": 0.5, "attribute": 0.25})
"""The weights by default, an assumption to be stated: say what your application loses by each."""
ALL = "all"


@dataclass(frozen=True)
class Share:
    """The wrong answers of one level, of one kind in it, or of all."""

    level: str
    """One of `concepts.schema.LEVELS`, or ``all``."""
    kind: str
    """Kind of the questions, or ``all`` of the level."""
    n: int
    """Questions with candidates."""
    frequency: Estimate
    """Wrong answers among the questions."""
    severity: Estimate
    """Mean weight of a wrong answer; NaN where none is wrong."""
    harm: Estimate
    """Weight of the wrong answers per question: frequency times severity."""
    unparsed: int
    """Answers that are none of the candidates; they count as wrong."""


@dataclass(frozen=True)
class Taxonomy:
    """What a system gets wrong, and what its answers cost."""

    shares: tuple[Share, ...]
    """All, then each level that was asked, each followed by its kinds."""
    cost: Cost
    weights: Mapping[str, float]
    """What was assumed: by ``level/kind`` the mean weight that its answers have where they are wrong."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def get(self, level: str = ALL, kind: str = ALL) -> Share:
        """Return one share; raises `ConfigError` for one that was not asked."""
        for share in self.shares:
            if (share.level, share.kind) == (level, kind):
                return share
        msg = f"no questions of {level}/{kind}: there are {', '.join(f'{s.level}/{s.kind}' for s in self.shares)}"
        raise ConfigError(msg)

    def frame(self) -> pd.DataFrame:
        """Return one row a share: each figure with ``<figure>_low`` and ``<figure>_high``, and the cost of an answer."""
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
    """How the wrong answers of a level differ between two systems on the same questions."""

    level: str
    accuracy: Comparison
    """Right answers, with the exact McNemar test and an interval of the difference."""
    harm: Estimate
    """Second minus first of the weight of wrong answers per question, paired, interval clustered by image."""


def tabulate(answers: BehaviorResult, severity: Severity = SEVERITY) -> Taxonomy:
    """Sort the wrong answers of a system by level and kind.

    Parameters
    ----------
    answers
        Answers with candidates; free text has no right answer and is passed over.
    severity
        Weights.

    Raises
    ------
    DataError
        Where no question has candidates.
    ConfigError
        For a weight that is not between 0 and 1.
    """
    weigh = _weigher(severity)
    rows = [a for a in answers.answers if a.correct is not None]
    if not rows:
        msg = "no question has candidates: there is no right or wrong to sort"
        raise DataError(msg)
    shares = [_share(ALL, ALL, rows, weigh)]
    for level in LEVELS:
        part = [a for a in rows if a.level == level]
        if part:
            kinds = dict.fromkeys(a.kind for a in part)
            shares.append(_share(level, ALL, part, weigh))
            shares += [_share(level, kind, [a for a in part if a.kind == kind], weigh) for kind in kinds]
    held: dict[str, list[float]] = {}
    for row in rows:
        held.setdefault(f"{row.level}/{row.kind}", []).append(weigh(row))
    return Taxonomy(tuple(shares), answers.cost, {name: float(np.mean(values)) for name, values in held.items()})


def compare_systems(
    first: BehaviorResult, second: BehaviorResult, severity: Severity = SEVERITY, *, n: int = 1000, seed: int = 0
) -> tuple[Change, ...]:
    """Compare the wrong answers of two systems to the same questions: over all, then for each level that was asked.

    Parameters
    ----------
    first, second
        Answers to the same questions, in any order.
    severity
        Weights; the same for both systems.
    n, seed
        Not used since intervals have a formula; accepted so that calls stay as they are.

    Raises
    ------
    DataError
        Where the questions are not the same, or none has candidates.
    ConfigError
        For a weight that is not between 0 and 1.
    """
    del n, seed
    weigh = _weigher(severity)
    found: list[Change] = []
    for level in (ALL, *LEVELS):
        before, after = (r if level == ALL else r.where(level=level) for r in (first, second))
        pairs = [(a, b) for a, b in same_questions(before, after) if a.correct is not None and b.correct is not None]
        if not pairs and level != ALL:
            continue
        accuracy = compare(before, after)
        moved = np.array([weigh(b) * (not b.correct) - weigh(a) * (not a.correct) for a, b in pairs], dtype=np.float64)
        found.append(Change(level, accuracy, change_estimate(moved, [a.group for a, _ in pairs])))
    return tuple(found)


def changes_frame(changes: tuple[Change, ...]) -> pd.DataFrame:
    """Return one row a level of a comparison."""
    import pandas as pd

    rows = []
    for change in changes:
        held = asdict(change.accuracy)
        difference = held.pop("difference")
        rows.append(
            {
                "level": change.level,
                **held,
                **{f"difference_{key}": value for key, value in difference.items()},
                "harm": change.harm.value,
                "harm_low": change.harm.low,
                "harm_high": change.harm.high,
            }
        )
    return pd.DataFrame(rows)


def _weigher(severity: Severity) -> Callable[[Answer], float]:
    def weigh(row: Answer) -> float:
        weight = severity(row) if callable(severity) else severity.get(row.kind, severity.get(row.level, 1.0))
        if not 0 <= weight <= 1:  # a NaN is not either
            msg = f"severity of question '{row.id}' ({row.level}, {row.kind}) is {weight}: give a weight from 0 to 1"
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
