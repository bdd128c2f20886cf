"""Two systems on the same questions: by how much one is better, and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from behavior.result import Answer, BehaviorResult, rate_of
from groundscope.core.errors import DataError
from groundscope.core.statistics import FEW_GROUPS, Estimate, changes_of_columns, group_totals


@dataclass(frozen=True)
class Comparison:
    """A rate of two systems on the same questions."""

    rate: str
    first: float
    """The rate of the first system."""
    second: float
    difference: Estimate
    """Second minus first, -1 to 1, with its 95 % interval clustered by group; ``n`` is the number of questions."""
    gained: int
    """Questions that count for the second system only."""
    lost: int
    """Questions that count for the first system only."""
    p_value: float
    """Two-sided exact test that gains and losses are equally likely, with groups as the units (`mcnemar_by_group`)."""


def compare(
    first: BehaviorResult, second: BehaviorResult, rate: str = "accuracy", *, n: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two systems, or one before and after, question by question.

    Questions of one group are not independent: the interval (`change_interval`) and the test (`mcnemar_by_group`) take
    whole groups as the units. Where every group has one question the test is McNemar's exact one.

    Parameters
    ----------
    first, second
        Answers to the same questions, in any order.
    rate
        One of `behavior.result.RATES`.
    n, seed
        Not used since the interval has a formula; accepted so that calls stay as they are.

    Raises
    ------
    DataError
        Where the questions are not the same, or the rate applies to none.
    ConfigError
        For an unknown rate.
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
        msg = f"rate '{rate}' applies to none of the {len(first)} questions"
        raise DataError(msg)
    table = np.array(counted, dtype=np.int64)  # [N, 2]
    change = table[:, 1] - table[:, 0]
    gained, lost = int((change == 1).sum()), int((change == -1).sum())
    del n, seed
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
    """Pair the answers of two systems, in the order of the first; raises `DataError` where their questions differ."""
    others = {a.id: a for a in second.answers}
    ids = {a.id for a in first.answers}
    if ids != set(others):
        missing = sorted(ids ^ set(others))
        msg = f"the two systems answered different questions: '{missing[0]}' is in one only ({len(missing)} such)"
        raise DataError(msg)
    pairs = [(before, others[before.id]) for before in first.answers]
    for before, after in pairs:
        if (before.question, before.answer, before.split) != (after.question, after.answer, after.split):
            msg = f"question '{before.id}' is not the same for the two systems: their data differ"
            raise DataError(msg)
    return pairs


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p-value that of ``gained + lost`` fair coin flips so few or so many are gains.

    McNemar's exact test (McNemar 1947), for independent questions; with several of an image use `mcnemar_by_group`.
    """
    flips, fewer = gained + lost, min(gained, lost)
    # In logarithms: 2 ** -flips is below the smallest float from 1,075 flips on.
    logs = [
        math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def mcnemar_by_group(change: Iterable[int] | np.ndarray, groups: Iterable[Hashable]) -> float:
    """Return the exact two-sided p-value that gains and losses are equally likely, questions of a group kept together.

    If the two systems are equally good, exchanging them in any group changes nothing, so that a group's gains less its
    losses are as likely to have one sign as the other. p is the share of all choices of signs for which the sum over groups
    is as far from 0 as it is, or farther. All choices are counted, by adding one group after the other to the
    distribution of the sum. With one question a group this is McNemar's exact test; groups whose gains equal their losses
    say nothing. Ignoring groups, p-values are too small where questions of an image are gained or lost together.

    Parameters
    ----------
    change
        1 for a question gained, -1 for one lost, 0 for one that stays: whole numbers ``[N]``.
    groups
        The group of each question.

    Raises
    ------
    DataError
        Where there are not as many groups as changes, or a change is not whole.
    """
    changes = np.asarray(list(change), dtype=np.float64)
    if (changes != np.round(changes)).any():
        msg = "changes must be whole numbers: 1 for a question gained, -1 for one lost, 0 otherwise"
        raise DataError(msg)
    net = np.abs(group_totals(changes[:, None], groups)[:, 0]).astype(np.int64)
    seen = abs(int(changes.sum()))
    net = np.sort(net[net > 0])
    if seen == 0:
        return 1.0
    # chances[k]: of the sum k - reach, over the groups added so far. Adding only positive numbers, tails stay exact.
    reach = int(net.sum())
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    done = 0
    for step in net.tolist():
        part = chances[reach - done : reach + done + 1] / 2
        done += step
        chances[reach - done : reach + done + 1] = 0
        chances[reach - done : reach + done + 1 - 2 * step] += part
        chances[reach - done + 2 * step : reach + done + 1] += part
    return min(1.0, 2 * math.fsum(chances[reach + seen :].tolist()))


def change_estimate(change: np.ndarray, groups: Sequence[Hashable]) -> Estimate:
    """Return the mean of changes from -1 to 1 ``[N]`` with its interval (`change_interval`)."""
    low, high = change_interval(change, groups)
    return Estimate(float(np.mean(change)), low, high, len(change), len(set(groups)) < FEW_GROUPS)


def change_interval(
    change: np.ndarray, groups: Sequence[Hashable], n: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return an interval, clustered by group, of the mean of changes from -1 to 1 ``[N]``.

    See `groundscope.core.statistics.changes_of_columns`. `n` and `seed` are not used since it has a formula; they are accepted so
    that calls stay as they are.
    """
    del n, seed
    low, high = changes_of_columns(change, groups, level)
    return float(low), float(high)
