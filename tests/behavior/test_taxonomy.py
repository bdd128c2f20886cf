"""Wrong answers by level, frequency and severity, and paired differences, by hand and against naive resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from behavior import BehaviorResult, taxonomy
from behavior.result import Answer, Cost
from groundscope.core.errors import ConfigError, DataError

LEVEL = {"existence": "object", "count": "object", "color": "attribute", "relation": "relation"}


def result(rows: list[tuple[str, bool | None]], per_image: int = 2) -> BehaviorResult:
    """Return answers of these kinds, right, wrong, or (None) none of the candidates."""
    answers = [
        Answer(id=str(i), group=str(i // per_image), split="neutral", level=LEVEL[kind], kind=kind, question=f"q{i}",
               answer="no", candidates=("yes", "no"), given=None if right is None else "no" if right else "yes",
               correct=bool(right))
        for i, (kind, right) in enumerate(rows)
    ]  # fmt: skip
    return BehaviorResult(tuple(answers), Cost(6.0, 3, len(rows)))


ROWS = [("existence", True), ("existence", False), ("count", False), ("color", False), ("color", None), ("color", True),
        ("relation", True), ("relation", True)]  # fmt: skip


def test_frequency_times_severity_by_hand() -> None:
    table = taxonomy.tabulate(result(ROWS), {"existence": 1.0, "object": 0.6, "attribute": 0.2})
    assert [(s.level, s.kind) for s in table.shares] == [
        ("all", "all"), ("object", "all"), ("object", "existence"), ("object", "count"),
        ("attribute", "all"), ("attribute", "color"), ("relation", "all"), ("relation", "relation"),
    ]  # fmt: skip
    thing = table.get("object")
    assert thing.frequency.value == pytest.approx(2 / 3)
    assert thing.severity.value == pytest.approx((1.0 + 0.6) / 2)
    assert thing.harm.value == pytest.approx(1.6 / 3)
    hue = table.get("attribute", "color")
    assert (hue.n, hue.unparsed) == (3, 1)
    assert hue.frequency.value == pytest.approx(2 / 3)
    assert hue.harm.value == pytest.approx(0.4 / 3)
    assert table.get("relation").frequency.value == 0
    assert table.get("relation").frequency.high > 0
    assert math.isnan(table.get("relation").severity.value)
    whole = table.get()
    assert (whole.n, whole.frequency.value) == (8, 0.5)
    assert whole.harm.value == pytest.approx(2.0 / 8)
    assert table.weights == {"object/existence": 1, "object/count": 0.6, "attribute/color": pytest.approx(0.2),
                             "relation/relation": 1}  # fmt: skip
    frame = table.frame()
    assert frame["seconds_per_answer"].tolist() == [0.75] * 8
    assert frame["forwards_per_answer"].tolist() == [3 / 8] * 8
    assert frame["harm"].tolist() == [s.harm.value for s in table.shares]


def test_a_weight_may_depend_on_the_answer() -> None:
    """A missed pedestrian: what is weighed is the single question."""
    table = taxonomy.tabulate(result(ROWS), lambda a: 1.0 if a.id == "1" else 0.0)
    assert table.get("object").harm.value == pytest.approx(1 / 3)
    assert table.get("attribute").harm.value == 0


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(LEVEL)), st.sampled_from([True, False, None])), min_size=1, max_size=40)
)
def test_harm_is_frequency_times_severity_and_levels_add_up(rows: list[tuple[str, bool | None]]) -> None:
    table = taxonomy.tabulate(result(rows))
    for share in table.shares:
        if share.frequency.value:
            assert share.harm.value == pytest.approx(share.frequency.value * share.severity.value)
        assert share.frequency.low <= share.frequency.value <= share.frequency.high
    levels = [s for s in table.shares if s.level != "all" and s.kind == "all"]
    assert sum(s.n for s in levels) == len(rows)
    assert sum(s.harm.value * s.n for s in levels) == pytest.approx(table.get().harm.value * len(rows))


def test_two_systems_by_level() -> None:
    rng = np.random.default_rng(0)
    kinds = ["existence", "color", "relation"] * 80
    first = [(k, bool(r)) for k, r in zip(kinds, rng.random(240) < 0.6, strict=True)]
    second = [(k, bool(r or (k == "color" and i % 2))) for i, (k, r) in enumerate(first)]
    weights = {"color": 0.5, "object": 1.0, "relation": 0.25}
    changes = taxonomy.compare_systems(result(first, 6), result(second, 6), weights)
    assert [c.level for c in changes] == ["all", "object", "attribute", "relation"]
    hue = changes[2]
    gained = sum(b and not a for (k, a), (_, b) in zip(first, second, strict=True) if k == "color")
    assert (hue.accuracy.gained, hue.accuracy.lost) == (gained, 0)
    assert hue.accuracy.p_value == pytest.approx(binomtest(gained, gained).pvalue)
    assert hue.harm.value == pytest.approx(-0.5 * gained / 80)
    moved = np.array([weights.get(k, 1.0) * (a - b) if k == "color" else 0.0
                      for (k, a), (_, b) in zip(first, second, strict=True)]).reshape(40, 6)  # fmt: skip
    draws = [moved[rng.integers(0, 40, 40)].mean() for _ in range(4000)]
    assert (changes[0].harm.low, changes[0].harm.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)
    still = changes[1]
    assert still.harm.value == 0
    assert still.harm.low < 0 < still.harm.high
    frame = taxonomy.changes_frame(changes)
    assert frame["level"].tolist() == ["all", "object", "attribute", "relation"]
    assert frame["harm"].tolist() == [c.harm.value for c in changes]


def test_invalid_weights_are_refused() -> None:
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(
            ConfigError, match=r"severity of question '\d' \(object, count\) is .*; give a weight from 0 to 1"
        ):
            taxonomy.tabulate(result([("existence", True), ("count", False)]), {"count": weight})
    with pytest.raises(DataError, match="no question has candidates"):
        taxonomy.tabulate(BehaviorResult((), Cost(None, None, 0)))
    with pytest.raises(ConfigError, match="no questions of relation/all; choose from all/all, object/all"):
        taxonomy.tabulate(result([("existence", True)])).get("relation")
    with pytest.raises(DataError, match="different questions"):
        taxonomy.compare_systems(result(ROWS), result(ROWS[:3]))
