"""Benchmarks with a judge: what is asked is written, what was said is read and scored by hand-worked examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from behavior import BehaviorResult, judge_files
from behavior.judge_files import Item
from behavior.result import Answer, Cost
from groundscope.core.errors import ConfigError, DataError

ITEMS = [
    Item("a", "What is it?", "A red cup on a table", "A cup.", "cup, table", "attribute", "1.jpg"),
    Item("b", "How many?", "Two ünits", "Three.", "units", "count", "2.jpg"),
    Item("c", "Where?", "Left", "Left.", "cup", "attribute", "1.jpg"),
]


def write_requests(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "out" / "requests.jsonl"
    assert judge_files.write_requests(path, name, ITEMS) == 3
    return path


def write_verdicts(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "verdicts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize("name", judge_files.BENCHMARKS)
def test_requests_hold_all_a_judge_needs(tmp_path: Path, name: str) -> None:
    records = [json.loads(line) for line in write_requests(tmp_path, name).read_text(encoding="utf-8").splitlines()]
    assert [r["id"] for r in records] == ["a", "b", "c"]
    assert records[1]["answer"] == "Two ünits"
    assert {r["benchmark"] for r in records} == {name}
    assert set(records[0]["verdict"]) == set(judge_files.BENCHMARKS[name].values)
    assert records[0]["image_content"] == "cup, table"
    assert len(records[0]["instruction"]) > 80


def test_mmhal(tmp_path: Path) -> None:
    verdicts = write_verdicts(tmp_path, {"id": "b", "rating": 2}, {"id": "a", "rating": 6}, {"id": "c", "rating": 3})
    scores = judge_files.read_verdicts(verdicts, write_requests(tmp_path, "mmhal"))
    assert scores.figures["score"].value == pytest.approx(11 / 3)
    assert scores.figures["hallucination_rate"].value == pytest.approx(1 / 3)
    assert scores.kinds["attribute"]["score"].value == pytest.approx(4.5)
    assert scores.kinds["count"]["hallucination_rate"].value == 1
    assert 0 <= scores.figures["score"].low < scores.figures["score"].high <= 6
    assert scores.unjudged == 0


def test_llava_bench(tmp_path: Path) -> None:
    verdicts = write_verdicts(tmp_path, {"id": "a", "rating": 6, "reference_rating": 8}, {"id": "b", "verdict": None},
                    {"id": "c", "rating": 3, "reference_rating": 10})  # fmt: skip
    scores = judge_files.read_verdicts(verdicts, write_requests(tmp_path, "llava_bench"))
    assert scores.figures["relative_score"].value == pytest.approx(100 * 9 / 18)
    assert scores.unjudged == 1
    assert list(scores.kinds) == ["attribute"]


def test_gavie(tmp_path: Path) -> None:
    verdicts = write_verdicts(
        tmp_path, *({"id": i, "accuracy": a, "relevancy": 9} for i, a in zip("abc", (4, 10, 1), strict=True))
    )
    scores = judge_files.read_verdicts(verdicts, write_requests(tmp_path, "gavie"))
    assert {k: v.value for k, v in scores.figures.items()} == {
        "accuracy": pytest.approx(5),
        "relevancy": pytest.approx(9),
    }


def test_cceval(tmp_path: Path) -> None:
    counts = [(4, 1, 5, 3), (2, 0, 4, 1), (0, 0, 1, 0)]
    names = ("mentioned", "hallucinated", "objects", "covered")
    verdicts = write_verdicts(
        tmp_path, *({"id": i, **dict(zip(names, c, strict=True))} for i, c in zip("abc", counts, strict=True))
    )
    scores = {
        k: v.value for k, v in judge_files.read_verdicts(verdicts, write_requests(tmp_path, "cceval")).figures.items()
    }
    assert scores == {
        "chair_i": pytest.approx(1 / 6), "chair_s": pytest.approx(1 / 3), "coverage": pytest.approx(4 / 10),
        "objects_per_caption": pytest.approx(2), "words_per_caption": pytest.approx((6 + 2 + 1) / 3),
    }  # fmt: skip


def test_items_of_answers() -> None:
    row = Answer("1", "x.jpg", "s", "object", "caption", "Describe.", "A cup.", (), None, None, text="A mug.")
    (item,) = judge_files.items_of(BehaviorResult((row,), Cost(None, None, 1)), {"x.jpg": "cup"})
    assert item == Item("1", "Describe.", "A mug.", "A cup.", "cup", "caption", "x.jpg")


RIGHT = [{"id": i, "rating": 4} for i in "abc"]
BAD: dict[str, tuple[list[Any], str]] = {
    "scale": ([{"id": "a", "rating": 7}], r"line 1: field 'rating' is 7, but must be from 0 to 6"),
    "words": ([{"id": "a", "rating": "six"}], r"line 1: field 'rating' must hold a number, not \"six\""),
    "no field": ([{"id": "a", "score": 1}], "line 1: no field 'rating'; it has 'id', 'score'"),
    "unknown": ([*RIGHT, {"id": "d", "rating": 1}], "line 4: field 'id': 'd' matches no request"),
    "twice": ([*RIGHT, RIGHT[0]], "line 4: field 'id': 'a' was already judged"),
    "missing": (RIGHT[:1], r"no verdict on 'b' \(2 of 3 requests have no verdict"),
    "no verdict": ([{"id": i, "verdict": None} for i in "abc"], "every verdict is null"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_verdicts_are_refused_with_their_place(tmp_path: Path, case: str) -> None:
    records, words = BAD[case]
    with pytest.raises(DataError, match=words):
        judge_files.read_verdicts(write_verdicts(tmp_path, *records), write_requests(tmp_path, "mmhal"))


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown judged benchmark 'x'; choose from mmhal, llava_bench"):
        judge_files.write_requests(tmp_path / "r", "x", ITEMS)
    with pytest.raises(DataError, match="item 'a' occurs twice"):
        judge_files.write_requests(tmp_path / "r", "gavie", [ITEMS[0], ITEMS[0]])
    with pytest.raises(DataError, match="item 'z' has no reference, which the judge of mmhal needs"):
        judge_files.write_requests(tmp_path / "r", "mmhal", [Item("z", "?", "x", image_content="y")])
    more = {"mentioned": 2, "hallucinated": 3, "objects": 1, "covered": 0}
    with pytest.raises(DataError, match="field 'hallucinated' is 3, but must not exceed 'mentioned', 2"):
        judge_files.read_verdicts(write_verdicts(tmp_path, {"id": "a", **more}), write_requests(tmp_path, "cceval"))
    with pytest.raises(DataError, match="expected requests of one benchmark, found none"):
        judge_files.read_verdicts(write_verdicts(tmp_path, *RIGHT), write_verdicts(tmp_path))
