"""Two systems on the same questions: by how much one is better, and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from behavior.result import Answer, BehaviorResult, rate_of
from groundscope.core.errors import DataError
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, wilson


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
    """Two-sided exact McNemar test that gains and losses are equally likely."""


def compare(
    first: BehaviorResult, second: BehaviorResult, rate: str = "accuracy", *, n: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two systems, or one before and after, question by question.

    The interval draws whole groups with replacement and takes both systems' answers along. With fewer than
    `groundscope.core.statistics.FEW_GROUPS` groups, or where all questions differ by the same, it is Wilson's with each group
    as one trial. The exact McNemar test (McNemar 1947; binomial on the questions they differ on) takes questions as
    independent: with several questions an image, trust the interval.

    Parameters
    ----------
    first, second
        Answers to the same questions, in any order.
    rate
        One of `behavior.result.RATES`.
    n, seed
        Number and seed of the bootstrap's draws.

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
    low, high = change_interval(change, groups, n, seed)
    return Comparison(
        rate=rate,
        first=float(table[:, 0].mean()),
        second=float(table[:, 1].mean()),
        difference=Estimate(float(change.mean()), low, high, len(change)),
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
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
    """Return the two-sided exact p-value that of ``gained + lost`` fair coin flips so few or so many are gains."""
    flips, fewer = gained + lost, min(gained, lost)
    # In logarithms: 2 ** -flips is below the smallest float from 1,075 flips on.
    logs = [
        math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def change_interval(change: np.ndarray, groups: Sequence[str], n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return an interval, by bootstrap over groups, of the mean of changes from -1 to 1 ``[N]``."""
    trials = len(set(groups))
    if not change.any():
        # No question differs: how often they may differ at most, either way.
        _, most = wilson(0, trials)
        return -most, most
    low, high = cluster_bootstrap(change, groups, n=n, seed=seed)
    if trials < FEW_GROUPS or high - low < 1e-12:
        # (change + 1) / 2 is between 0 and 1, and varies at most as much as a trial of that mean.
        low, high = (2 * end - 1 for end in wilson((float(change.mean()) + 1) / 2 * trials, trials))
    return low, high
