"""Paired comparison of two systems, against scipy, naive resampling and known answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from behavior import BehaviorResult, compare
from behavior.comparison import mcnemar, mcnemar_by_group
from behavior.result import Answer, Cost
from groundscope.core.errors import ConfigError, DataError


def result(right: np.ndarray, per_group: int = 1) -> BehaviorResult:
    rows = [
        Answer(
            id=f"q{i}",
            group=f"g{i // per_group}",
            split="random",
            level="object",
            kind="existence",
            question="?",
            answer="no",
            candidates=("yes", "no"),
            given="no" if r else "yes",
            correct=bool(r),
        )
        for i, r in enumerate(right)
    ]
    return BehaviorResult(tuple(rows), Cost(1, 1, len(rows)))


@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_with_many_questions() -> None:
    assert mcnemar(5200, 4800) == pytest.approx(binomtest(5200, 10000).pvalue, rel=1e-6)
    assert 0 < mcnemar(100, 1100) < 1e-200


def test_difference_by_hand() -> None:
    comparison = compare(result(np.array([1, 1, 0, 0, 0, 1] * 4)), result(np.array([1, 0, 1, 1, 0, 1] * 4)))
    assert (comparison.first, comparison.second) == (0.5, pytest.approx(4 / 6))
    assert comparison.difference.value == pytest.approx(1 / 6)
    assert (comparison.gained, comparison.lost, comparison.difference.n) == (8, 4, 24)
    assert comparison.p_value == pytest.approx(binomtest(8, 12).pvalue)
    assert comparison.difference.low < 0 < comparison.difference.high


def test_interval_agrees_with_resampling_groups_with_both_answers() -> None:
    rng = np.random.default_rng(0)
    shared = rng.random((80, 1)) < 0.6
    first = (shared & (rng.random((80, 4)) < 0.9)).ravel()
    second = (shared | (rng.random((80, 4)) < 0.2)).ravel()
    change = (second.astype(float) - first).reshape(80, 4)
    draws = [change[rng.integers(0, 80, size=80)].mean() for _ in range(5000)]
    comparison = compare(result(first, 4), result(second, 4))
    assert (comparison.difference.low, comparison.difference.high) == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.006
    )
    turned = compare(result(second, 4), result(first, 4))
    assert turned.difference.value == pytest.approx(-comparison.difference.value)
    assert (turned.difference.low, turned.difference.high) == pytest.approx(
        (-comparison.difference.high, -comparison.difference.low), abs=0.006
    )
    assert turned.p_value == comparison.p_value


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(1)
    first = rng.random(300) < 0.5
    second = first.copy()
    second[:20] = True
    comparison = compare(result(first), result(second))
    assert comparison.difference.low > 0
    assert comparison.difference.high - comparison.difference.low < 0.06


@pytest.mark.parametrize("n", [3, 50])
def test_no_comparison_is_certain(n: int) -> None:
    same = compare(result(np.ones(n)), result(np.ones(n)))
    assert (same.difference.value, same.p_value) == (0, 1)
    assert same.difference.low == -same.difference.high < 0
    better = compare(result(np.zeros(n)), result(np.ones(n)))
    assert better.difference.value == 1 == better.difference.high
    assert 1 - better.difference.low > 0
    few = compare(result(np.array([0, 1, 1])), result(np.array([1, 1, 1])))
    assert few.difference.low < 0 < few.difference.value < few.difference.high


def test_the_order_of_answers_and_other_rates() -> None:
    before, after = result(np.array([0, 0, 1, 1])), result(np.array([1, 0, 1, 1]))
    turned = BehaviorResult(after.answers[::-1], after.cost)
    assert compare(before, turned) == compare(before, after)
    comparison = compare(before, after, rate="false_positive_rate")
    assert (comparison.first, comparison.second, comparison.gained, comparison.lost) == (0.5, 0.25, 0, 1)


def test_incomparable_results_are_refused() -> None:
    first = result(np.ones(3))
    with pytest.raises(DataError, match=r"different questions: only one answered 'q2' \(1 such\)"):
        compare(first, result(np.ones(2)))
    changed = (replace(first.answers[0], question="another"), *first.answers[1:])
    with pytest.raises(DataError, match="question 'q0' differs"):
        compare(first, BehaviorResult(changed, first.cost))
    with pytest.raises(DataError, match="'wrong_by_prior' applies to none of the 3"):
        compare(first, first, rate="wrong_by_prior")
    with pytest.raises(ConfigError, match="unknown rate 'f1'"):
        compare(first, first, rate="f1")


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 6)), max_size=14))
def test_the_test_by_group_is_the_count_of_all_choices_of_signs(rows: list[tuple[int, int]]) -> None:
    nets = [sum(c for c, g in rows if g == name) for name in range(7)]
    sums = [abs(sum(s * n for s, n in zip(signs, nets, strict=True))) for signs in product((-1, 1), repeat=7)]
    expected = np.mean([total >= abs(sum(nets)) for total in sums])
    assert mcnemar_by_group([c for c, _ in rows], [g for _, g in rows]) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_test_by_group_is_mcnemars_where_questions_are_independent(gained: int, lost: int) -> None:
    change = [1] * gained + [-1] * lost + [0] * 5
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_by_group(change, range(len(change))) == pytest.approx(expected, rel=1e-9)


def test_questions_of_one_image_count_once() -> None:
    """Twelve questions gained in two images are two coin flips, not twelve."""
    assert mcnemar(12, 0) < 0.001
    assert mcnemar_by_group([1] * 12, [0] * 6 + [1] * 6) == 0.5
    comparison = compare(result(np.zeros(12), 6), result(np.ones(12), 6))
    assert comparison.p_value == 0.5
    assert comparison.difference.few_groups
    with pytest.raises(DataError, match="whole numbers"):
        mcnemar_by_group([0.5], [0])
    with pytest.raises(DataError, match="1 group for 2 rows"):
        mcnemar_by_group([1, 1], [0])


def test_the_test_by_group_holds_where_questions_go_together() -> None:
    """Two equal systems; every image's questions are gained or lost together: McNemar's p is too small in half of samples."""
    rng = np.random.default_rng(0)
    wrong = {"group": 0, "row": 0}
    for _ in range(200):
        change = np.repeat(rng.choice([-1, 0, 1], 40), 8)
        groups = np.repeat(np.arange(40), 8)
        wrong["group"] += mcnemar_by_group(change, groups.tolist()) <= 0.05
        wrong["row"] += mcnemar(int((change == 1).sum()), int((change == -1).sum())) <= 0.05
    assert binomtest(wrong["group"], 200, 0.05, alternative="greater").pvalue > 0.01
    assert wrong["row"] > 60


def test_many_questions_have_a_p_value_that_is_right() -> None:
    change = [1] * 5200 + [-1] * 4800
    assert mcnemar_by_group(change, range(10_000)) == pytest.approx(binomtest(5200, 10_000).pvalue, rel=1e-6)
