"""Figures of released rules, with intervals clustered by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkScore
from behavior.benchmarks.specification import Scoring
from behavior.result import Answer, BehaviorResult, Cost
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, estimate, ratio
from groundscope.core.text import format_count

T = TypeVar("T")


def share(hits: Iterable[bool | float], groups: Iterable[Hashable], of: Iterable[float] | None = None) -> Estimate:
    """Return a rate, or a ratio of totals, with its interval; NaN over nothing.

    >>> from behavior.benchmarks.rates import share
    >>> share([True, False], ["a.jpg", "b.jpg"]).value
    0.5
    """
    return estimate(list(hits), list(groups), None if of is None else list(of))


def average(values: Sequence[float], groups: Sequence[Hashable], low: float, high: float) -> Estimate:
    """Return the mean of ratings from `low` to `high`, with its interval.

    >>> from behavior.benchmarks.rates import average
    >>> average([2.0, 4.0], ["a.jpg", "b.jpg"], 0, 6).value
    3.0
    """
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    scaled = estimate([(v - low) / (high - low) for v in values], list(groups))
    width = high - low
    mean = sum(values) / len(values)
    return Estimate(mean, low + width * scaled.low, low + width * scaled.high, scaled.n, scaled.few_groups)


def summed(estimates: Sequence[Estimate], divisor: float = 1.0) -> Estimate:
    """Return the sum of estimates divided by a number; its interval is the sum of theirs, which is wider than needed.

    >>> from behavior.benchmarks.rates import summed
    >>> from groundscope.core.statistics import Estimate
    >>> summed([Estimate(0.5, 0.25, 0.75, 4), Estimate(1.0, 0.75, 1.0, 4)], 2).value
    0.75
    """
    value, low, high = (sum(getattr(e, end) for e in estimates) / divisor for end in ("value", "low", "high"))
    return Estimate(value, low, high, sum(e.n for e in estimates), any(e.few_groups for e in estimates))


def raw_mean(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """Return the mean of values without an upper bound, with a bootstrap interval.

    >>> from behavior.benchmarks.rates import raw_mean
    >>> raw_mean([2.0, 4.0], ["a.jpg", "b.jpg"]).value
    3.0
    """
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    low, high = cluster_bootstrap(list(values), list(groups))
    return Estimate(sum(values) / len(values), low, high, len(values), len(set(groups)) < FEW_GROUPS)


def raw_ratio(above: Sequence[float], below: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """Return a ratio of totals that may exceed 1, with a bootstrap interval; NaN over nothing.

    >>> from behavior.benchmarks.rates import raw_ratio
    >>> raw_ratio([3, 0], [1, 1], ["a.jpg", "b.jpg"]).value
    1.5
    """
    total = sum(below)
    if not total:
        return Estimate(math.nan, math.nan, math.nan, 0)
    low, high = cluster_bootstrap(list(zip(above, below, strict=True)), list(groups), ratio)
    return Estimate(sum(above) / total, low, high, round(total), len(set(groups)) < FEW_GROUPS)


def with_value(exact: Estimate, value: float) -> Estimate:
    """Return an estimate with another value, and the interval widened to contain it.

    For a rule that adds constants to denominators or rounds: the interval is that of the exact ratio.

    >>> from behavior.benchmarks.rates import with_value
    >>> from groundscope.core.statistics import Estimate
    >>> with_value(Estimate(0.5, 0.4, 0.6, 9), 0.7).high
    0.7
    """
    if math.isnan(exact.value):
        return Estimate(value, math.nan, math.nan, exact.n, exact.few_groups)
    return Estimate(value, min(exact.low, value), max(exact.high, value), exact.n, exact.few_groups)


def grouped(rows: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Return rows by a key, in order of first appearance.

    >>> from behavior.benchmarks.rates import grouped
    >>> grouped([1, 2, 3], lambda n: n % 2)
    {1: [1, 3], 0: [2]}
    """
    groups: dict[Hashable, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def score_of(
    name: str,
    scoring: Scoring,
    answers: Sequence[Answer],
    figures: Mapping[str, Estimate],
    *,
    parts: Mapping[str, Mapping[str, Estimate]] | None = None,
    unparsed: int = 0,
    notes: Iterable[str] = (),
) -> BenchmarkScore:
    """Return the result of a rule, with the counts of missing and unparsed answers."""
    rows = scoring.rows
    seconds = [row.seconds for row in rows]
    total = sum(s for s in seconds if s is not None) if seconds and None not in seconds else None
    provenance = {
        "benchmark": name,
        "variant": scoring.variant,
        "files": {role: str(path) for role, path in scoring.files.items()},
    }
    return BenchmarkScore(
        name,
        scoring.variant,
        figures,
        BehaviorResult(tuple(answers), Cost(total, None, len(answers)), provenance),
        parts or {},
        {row.question.id: row.question.task for row in rows},
        len(scoring.missing),
        unparsed,
        tuple(notes),
    )


def incomplete_note(count: int, what: str) -> tuple[str, ...]:
    """Return a sentence about groups that lack an answer; empty for none."""
    return (f"{format_count(count, what)} without all answers left out",) if count else ()


def groups_of(rows: Iterable[AnsweredQuestion]) -> list[str]:
    """Return what intervals are clustered by, for each row."""
    return [row.question.group for row in rows]
