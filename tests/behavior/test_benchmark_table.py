"""The table that papers print, against scikit-learn, and parts of combined data."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from behavior import Answer, BehaviorResult, Cost, benchmark_table
from behavior.metrics import compute_metrics
from behavior.parsing import parsers_of
from concepts import ConceptDataset, Example, combine_datasets, scenes


def answers(seed: int, parts: tuple[str, ...] = ()) -> BehaviorResult:
    rng = np.random.default_rng(seed)
    rows = []
    for part in parts or ("",):
        for split in ("random", "popular"):
            for i in range(30):
                truth, choice = (["yes", "no"][int(rng.random() < 0.4)] for _ in range(2))
                name = f"{part}/{split}/{i}" if part else f"{split}/{i}"
                about = (name, f"image {i // 3}", split, "object", "existence", "Is there a dog?", truth, ("yes", "no"))
                rows.append(Answer(*about, given=choice, correct=choice == truth))
    return BehaviorResult(tuple(rows), Cost(None, None, len(rows)), {"data": "d", "parts": list(parts)})


def test_figures_are_those_of_scikit_learn_and_means_are_unweighted() -> None:
    result = answers(0, ("coco", "gqa"))
    table = benchmark_table(result)
    assert [(r.data, r.split) for r in table.rows] == [
        (part, split) for part in ("coco", "gqa") for split in ("random", "popular", "mean")
    ]
    for row in table.rows:
        if row.split == "mean":
            continue
        chosen = [a for a in result.answers if a.id.startswith(f"{row.data}/{row.split}/")]
        true, predicted = ([getattr(a, field) == "yes" for a in chosen] for field in ("answer", "given"))
        expected = {
            "accuracy": accuracy_score(true, predicted),
            "precision": precision_score(true, predicted),
            "recall": recall_score(true, predicted),
            "f1": f1_score(true, predicted),
            "yes_ratio": np.mean(predicted),
        }
        assert {n: f.value for n, f in row.figures.items()} == pytest.approx(expected)
        assert row.n == 30
    f1 = {r.split: r.figures["f1"].value for r in table.rows[:3]}
    assert f1["mean"] == pytest.approx((f1["random"] + f1["popular"]) / 2)
    assert math.isnan(table.rows[2].figures["f1"].low)
    json.dumps(table.records(), allow_nan=False)
    frame = table.frame()
    assert list(frame["split"]) == [r.split for r in table.rows]
    assert frame["accuracy_low"].notna().sum() == 4


def test_other_forms_have_an_accuracy_only() -> None:
    about = ("image", "neutral", "attribute", "what_color", "What color?", "red")
    rows = (
        Answer("1", *about, ("red", "green"), given="red", correct=True),
        Answer("2", *about, ("red", "green"), given=None, correct=False, text="blue"),
        Answer("3", *about, (), given=None, correct=None, text="a caption"),
    )
    table = benchmark_table(BehaviorResult(rows, Cost(None, None, 3)))
    (row,) = table.rows
    assert (row.form, row.n, row.unparsed, list(row.figures), row.figures["accuracy"].value) == (
        "choice", 2, 1, ["accuracy"], 0.5,
    )  # fmt: skip
    assert table.text().splitlines()[1].split() == ["answers", "neutral", "2", "50.0", "1"]


def caption(number: str, loader: str) -> ConceptDataset:
    source = scenes.dataset(10)[0]
    about = (source.image, "Describe the image.", "A dog.", (), "object", "caption", "caption", f"image {number}")
    return ConceptDataset(number, (Example(number, *about, objects=source.objects),), {"loader": loader})


def test_parts_are_parsed_and_captions_scored_each_by_the_rules_of_its_data() -> None:
    data = combine_datasets({"a": caption("1", "mme"), "b": caption("2", "coco"), "c": caption("3", "coco")})
    names, rules = parsers_of(data)
    assert names == "mme, yes_no"
    assert rules["a/1"]("nothing") == "no"  # an error of MME's release
    assert rules["b/2"]("nothing") is None
    rows = tuple(
        Answer(e.id, e.group, e.split, e.level, e.kind, e.question, e.answer, (), None, None, text="A zebra and a dog.")
        for e in data
        if not e.id.startswith("a/")
    )
    rates = compute_metrics(BehaviorResult(rows, Cost(None, None, 2)), data)
    # "zebra" is a category of COCO that is neither annotated nor in the human caption; "dog" is in the caption.
    assert rates["b, caption: invented of named (CHAIR_i)"].value == 0.5
    assert rates["c, caption: with something invented (CHAIR_s)"].value == 1.0
