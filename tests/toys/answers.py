"""Equality of answers that were computed with and without a shared prefix, whose last bits can differ."""

from __future__ import annotations

import pytest

from behavior import BehaviorResult


def assert_equal_answers(a: BehaviorResult, b: BehaviorResult) -> None:
    """Raise unless two results have equal answers, and margins equal to 1e-4."""
    assert [(r.id, r.given, r.correct, r.text) for r in a.answers] == [
        (r.id, r.given, r.correct, r.text) for r in b.answers
    ]
    margins = [r.margin for r in b.answers if r.margin is not None]
    assert [r.margin for r in a.answers if r.margin is not None] == pytest.approx(margins, abs=1e-4)
