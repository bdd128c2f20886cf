"""Compare two systems on the same questions: paired difference with interval, and an exact test."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from behavior.result import Answer, BehaviorResult, rate_of
from groundscope.core.errors import DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import FEW_GROUPS, Estimate, changes_of_columns, group_totals
from groundscope.core.text import format_count


@dataclass(frozen=True)
class Comparison:
    """The same rate for two systems on the same questions.

    Examples
    --------
    >>> import groundscope as gs
    >>> question = ("image 1", "neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    >>> answers = gs.BehaviorResult((gs.Answer("q1", *question, "yes", correct=True),), gs.Cost(None, None, 1))
    >>> comparison = gs.behavior.compare(answers, answers)
    >>> comparison.first, comparison.second, comparison.p_value
    (1.0, 1.0, 1.0)
    """

    rate: str
    first: float
    """The rate of the first system."""
    second: float
    difference: Estimate
    """Second minus first, -1 to 1, with its 95 % interval clustered by group; ``n`` is the number of questions."""
    gained: int
    """Questions where the rate is true for the second system only."""
    lost: int
    """Questions where the rate is true for the first system only."""
    p_value: float
    """Two-sided exact test that gains and losses are equally likely, with groups as units (`mcnemar_by_group`)."""

    __repr__ = short_repr


def compare(first: BehaviorResult, second: BehaviorResult, *, rate: str = "accuracy") -> Comparison:
    """Compare two systems, or one system before and after a change, question by question.

    Questions of one group are not independent: the interval (`change_interval`) and the test (`mcnemar_by_group`) use
    whole groups as units. If every group has one question, the test is McNemar's exact test.

    Parameters
    ----------
    first, second
        Answers to the same questions, in any order.
    rate
        One of `behavior.result.RATES`.

    Raises
    ------
    DataError
        If the questions differ, or the rate applies to no question.
    ConfigError
        For an unknown rate.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> question = ("neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    >>> rows = [gs.Answer(f"q{i}", f"image {i}", *question, "no", correct=False) for i in range(4)]
    >>> first = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 4))
    >>> corrected = [replace(row, given="yes", correct=True) for row in rows[:3]]
    >>> second = gs.BehaviorResult((*corrected, rows[3]), gs.Cost(None, None, 4))
    >>> comparison = gs.behavior.compare(first, second)
    >>> comparison.difference.value, comparison.gained, comparison.p_value
    (0.75, 3, 0.25)
    """
    value = rate_of(rate)
    counted: list[tuple[bool, bool]] = []
    groups: list[str] = []
    for before, after in same_questions(first, second):
        a, b = value(before), value(after)
        if a is not None and b is not None:
            counted.append((a, b))
            groups.append(before.group)
    if not counted:
        msg = f"rate '{rate}' applies to none of the {format_count(len(first), 'question')}; choose a rate that applies"
        raise DataError(msg)
    table = np.array(counted, dtype=np.int64)  # [N, 2]
    change = table[:, 1] - table[:, 0]
    gained, lost = int((change == 1).sum()), int((change == -1).sum())
    return Comparison(
        rate=rate,
        first=float(table[:, 0].mean()),
        second=float(table[:, 1].mean()),
        difference=change_estimate(change, groups),
        gained=gained,
        lost=lost,
        p_value=mcnemar_by_group(change, groups),
    )


def same_questions(first: BehaviorResult, second: BehaviorResult) -> list[tuple[Answer, Answer]]:
    """Pair the answers of two systems, in the order of the first; raises `DataError` if their questions differ."""
    others = {a.id: a for a in second.answers}
    ids = {a.id for a in first.answers}
    if ids != set(others):
        missing = sorted(ids ^ set(others))
        msg = f"the two systems answered different questions: only one answered '{missing[0]}' ({len(missing)} such)"
        raise DataError(msg)
    pairs = [(before, others[before.id]) for before in first.answers]
    for before, after in pairs:
        if (before.question, before.answer, before.split) != (after.question, after.answer, after.split):
            msg = f"question '{before.id}' differs between the two systems; compare answers to the same dataset"
            raise DataError(msg)
    return pairs


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact binomial p-value of `gained` among ``gained + lost`` with probability 1/2.

    McNemar's exact test (McNemar 1947), for independent questions; for several questions per image use
    `mcnemar_by_group`.
    """
    flips, fewer = gained + lost, min(gained, lost)
    # In logarithms: 2 ** -flips underflows from 1,075 flips on.
    logs = [
        math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def mcnemar_by_group(change: Iterable[int] | np.ndarray, groups: Iterable[Hashable]) -> float:
    """Return the exact two-sided p-value of a sign-flip test that gains and losses are equally likely, by group.

    Under the null hypothesis the two systems are exchangeable within any group, so a group's gains minus losses has either
    sign with equal probability. p is the share of all sign assignments for which the sum over groups is at least as far
    from 0 as the observed one. The exact distribution of the sum is computed by convolution, one group at a time. With one
    question per group this is McNemar's exact test; groups with equal gains and losses do not contribute. Ignoring groups
    makes p-values too small if questions of an image are gained or lost together.

    Parameters
    ----------
    change
        1 for a gained question, -1 for a lost question, 0 for no change: whole numbers ``[N]``.
    groups
        The group of each question.

    Raises
    ------
    DataError
        If the numbers of groups and changes differ, or a change is not a whole number.
    """
    changes = np.asarray(list(change), dtype=np.float64)
    if (changes != np.round(changes)).any():
        msg = "changes must be whole numbers: 1 for a gained question, -1 for a lost question, 0 otherwise"
        raise DataError(msg)
    net = np.abs(group_totals(changes[:, None], groups)[:, 0]).astype(np.int64)
    observed = abs(int(changes.sum()))
    net = np.sort(net[net > 0])
    if observed == 0:
        return 1.0
    # chances[k]: probability of the sum k - reach over the groups added so far. Only positive terms, so tails are exact.
    reach = int(net.sum())
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    extent = 0
    for step in net.tolist():
        half = chances[reach - extent : reach + extent + 1] / 2
        extent += step
        chances[reach - extent : reach + extent + 1] = 0
        chances[reach - extent : reach + extent + 1 - 2 * step] += half
        chances[reach - extent + 2 * step : reach + extent + 1] += half
    return min(1.0, 2 * math.fsum(chances[reach + observed :].tolist()))


def change_estimate(change: np.ndarray, groups: Sequence[Hashable]) -> Estimate:
    """Return the mean of changes from -1 to 1 ``[N]`` with its interval (`change_interval`)."""
    low, high = change_interval(change, groups)
    return Estimate(float(np.mean(change)), low, high, len(change), len(set(groups)) < FEW_GROUPS)


def change_interval(change: np.ndarray, groups: Sequence[Hashable], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval, clustered by group, of the mean of changes from -1 to 1 ``[N]``.

    See `groundscope.core.statistics.changes_of_columns`.
    """
    low, high = changes_of_columns(change, groups, confidence)
    return float(low), float(high)
