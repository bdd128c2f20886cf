"""POPE: parsers, scores and the three splits, by hand and against scikit-learn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from behavior.parsing import PARSERS, read_answer
from behavior.pope import build, score, write_questions
from concepts import loaders
from groundscope.core.errors import ConfigError, DataError

# ---- parsers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pope_release", "mme", "strict", "yes_no", "vlmevalkit"),
    [
        ("yes", "yes", "yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no", "no", "no"),
        ("No", "no", "no", "no", "no", "no"),
        ("NO", "yes", "no", "no", None, "no"),
        ("Yes", "yes", "yes", "yes", "yes", "yes"),
        (" Yes.", "yes", "yes", "yes", "yes", "yes"),
        ("No.", "no", "no", "no", "no", "no"),
        ("No, there is no dog.", "no", "no", None, "no", "no"),
        ("There is not a dog. Yes", "no", None, None, "no", "yes"),
        ("There is a dog. No cat.", "yes", None, None, None, "no"),
        ("Yes, there is no doubt", "no", "yes", None, "no", None),
        ("nothing", "yes", "no", None, None, None),
        ("I do not know", "no", None, None, "no", None),
        ("I cannot tell", "yes", None, None, None, None),
        ("It's not,", "no", None, None, "no", None),
        ("no\nyes", "yes", "no", None, "yes", None),
        ("", "yes", None, None, None, None),
        ("yes..", "yes", "yes", None, "yes", "yes"),
        ("  Yes", "yes", None, "yes", "yes", "yes"),
        ("**Yes**", "yes", None, None, "yes", None),
        ("No!", "yes", "no", None, None, "no"),
        ("None", "yes", "no", None, None, None),
    ],
)
def test_parsers_case_by_case(
    text: str, pope_release: str, mme: str | None, strict: str | None, yes_no: str | None, vlmevalkit: str | None
) -> None:
    amber = {"Yes": "yes", "No": "no"}.get(text)
    lmms_eval = {"yes": "yes", "no": "no"}.get(text.lower().strip())
    expected = {
        "pope_release": pope_release, "mme": mme, "strict": strict, "amber_release": amber, "yes_no": yes_no,
        "lmms_eval": lmms_eval, "vlmevalkit": vlmevalkit,
    }  # fmt: skip
    assert {name: rule(text) for name, rule in PARSERS.items()} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Red.", "red"), ("It is red, truly red", "red"), ("red or green", None), ("infrared", None), ("", None)],
)
def test_other_candidates_are_found_as_whole_words(text: str, expected: str | None) -> None:
    assert read_answer(text, ("red", "green"), PARSERS["strict"]) == expected


# ---- scores ------------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """3 hits, 2 false alarms, 4 right refusals, 1 miss."""
    answers = ["Yes"] * 3 + ["Yes, there is."] * 2 + ["No"] * 4 + ["no"]
    labels = ["yes"] * 3 + ["no"] * 2 + ["no"] * 4 + ["yes"]
    scores = score(answers, labels)
    assert scores.n == 10
    assert scores.accuracy.value == pytest.approx(7 / 10)
    assert scores.precision.value == pytest.approx(3 / 5)
    assert scores.recall.value == pytest.approx(3 / 4)
    assert scores.f1.value == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    assert scores.yes_ratio.value == pytest.approx(5 / 10)  # the labels' would be 4/10
    assert scores.unparsed == 0


pairs = st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=40)


@settings(max_examples=30)
@given(pairs)
def test_scores_are_scikit_learns(rows: list[tuple[str, str]]) -> None:
    answers, labels = [a for a, _ in rows], [b for _, b in rows]
    scores = score(answers, labels)
    assert scores.accuracy.value == pytest.approx(accuracy_score(labels, answers))
    assert scores.yes_ratio.value == pytest.approx(answers.count("yes") / len(rows))
    for name, metric in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected = metric(labels, answers, pos_label="yes", zero_division=np.nan)
        assert getattr(scores, name).value == pytest.approx(expected, nan_ok=True)


@settings(max_examples=30)
@given(pairs)
def test_yes_ratio_does_not_see_the_labels(rows: list[tuple[str, str]]) -> None:
    answers = [a for a, _ in rows]
    assert score(answers, [b for _, b in rows]).yes_ratio == score(answers, ["no"] * len(rows)).yes_ratio


def test_answers_that_are_neither_count_as_wrong_and_are_counted() -> None:
    scores = score(["yes", "perhaps", "maybe", "no"], ["yes", "yes", "no", "no"], parser="strict")
    assert scores.unparsed == 2
    assert scores.accuracy.value == pytest.approx(2 / 4)
    assert scores.precision.value == pytest.approx(1.0)
    assert scores.recall.value == pytest.approx(1 / 2)
    assert scores.yes_ratio.value == pytest.approx(1 / 4)
    # The rule of the release takes it for yes; it is still counted as unparsed next to that.
    released = score(["yes", "perhaps"], ["yes", "no"], parser="pope_release")
    assert (released.yes_ratio.value, released.unparsed) == (1.0, 1)
    assert score(["yes", "perhaps"], ["yes", "no"]).yes_ratio.value == 0.5


def test_undefined_figures_are_nan_and_intervals_have_a_width() -> None:
    scores = score(["no"] * 12, ["no"] * 12)
    assert math.isnan(scores.precision.value)
    assert math.isnan(scores.recall.value)
    assert math.isnan(scores.f1.value)
    assert (scores.accuracy.value, scores.accuracy.high) == (1.0, 1.0)
    assert 0.7 < scores.accuracy.low < 0.8


def test_intervals_are_wider_where_the_questions_of_an_image_agree() -> None:
    answers = ["yes"] * 60 + ["no"] * 60
    labels = ["yes"] * 120
    by_image = score(answers, labels, groups=[f"image {i // 6}" for i in range(120)]).accuracy
    alone = score(answers, labels).accuracy
    assert by_image.high - by_image.low > 2 * (alone.high - alone.low)


def test_scoring_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="1 answer for 2 labels"):
        score(["yes"], ["yes", "no"])
    with pytest.raises(DataError, match="1 answer for 1 label and 2 groups"):
        score(["yes"], ["yes"], groups=["a", "b"])
    with pytest.raises(DataError, match="no answers"):
        score([], [])
    with pytest.raises(DataError, match="label 1 is 'ja'"):
        score(["yes", "no"], ["yes", "ja"])
    with pytest.raises(ConfigError, match="unknown parser 'x'"):
        score(["yes"], ["yes"], parser="x")


# ---- making questions --------------------------------------------------------------------------------------------------

IMAGES = {
    "1.png": ["person", "car", "dog"],
    "2.png": ["person", "car", "bus"],
    "3.png": ["person", "apple", "dog"],
    "4.png": ["person", "apple"],
}


def questions_of(records: Sequence[Mapping[str, str | int]], image: str) -> list[tuple[str, str]]:
    """Return noun and label of an image's questions, in order."""
    words = [(str(r["text"]), str(r["label"])) for r in records if r["image"] == image]
    return [(t.removesuffix(" in the image?").split(" ", 3)[3], label) for t, label in words]


def test_popular_by_hand() -> None:
    """Frequencies: person 4, then car, dog and apple 2 each, met in this order, and bus 1."""
    popular = build(IMAGES, per_image=2)["popular"]
    assert questions_of(popular, "1.png") == [("person", "yes"), ("apple", "no"), ("car", "yes"), ("bus", "no")]
    assert questions_of(popular, "2.png") == [("person", "yes"), ("dog", "no"), ("car", "yes"), ("apple", "no")]
    assert questions_of(popular, "3.png") == [("person", "yes"), ("car", "no"), ("apple", "yes"), ("bus", "no")]
    assert questions_of(popular, "4.png") == [("person", "yes"), ("car", "no"), ("apple", "yes"), ("dog", "no")]


def test_adversarial_follows_the_object_just_asked_about() -> None:
    images = {
        "a.png": ["cup", "fork", "cat"],
        "b.png": ["fork", "knife", "sofa"],
        "c.png": ["fork", "knife", "cup"],
        "d.png": ["cat", "sofa", "lamp"],
        "e.png": ["sofa", "lamp", "mouse"],
        "f.png": ["lamp", "sofa", "mouse"],
        "g.png": ["lamp", "sofa", "rug"],
    }
    built = build(images)
    # With cup: fork 2, cat 1, knife 1 -> knife. With fork: knife (asked), sofa. With cat: lamp (sofa was asked).
    assert questions_of(built["adversarial"], "a.png") == [
        ("cup", "yes"),
        ("knife", "no"),
        ("fork", "yes"),
        ("sofa", "no"),
        ("cat", "yes"),
        ("lamp", "no"),
    ]
    # By frequency: sofa 5, lamp 4, (fork), knife 2.
    assert [noun for noun, label in questions_of(built["popular"], "a.png") if label == "no"] == [
        "sofa",
        "lamp",
        "knife",
    ]


def many_images(seed: int) -> dict[str, list[str]]:
    rng = random.Random(seed)
    nouns = [f"noun{i}" for i in range(15)]
    return {f"{i}.png": rng.sample(nouns, rng.randint(1, 7)) for i in range(40)}


@settings(max_examples=30)
@given(st.integers(0, 50), st.integers(1, 4))
def test_every_split_keeps_the_rules(seed: int, per_image: int) -> None:
    images = many_images(seed)
    able = [name for name, objects in images.items() if len(objects) >= per_image]
    built = build(images, seed=seed, per_image=per_image)
    assert list(built) == ["random", "popular", "adversarial"]
    for records in built.values():
        assert [r["question_id"] for r in records] == list(range(1, 2 * per_image * len(able) + 1))
        assert [r["label"] for r in records] == ["yes", "no"] * (per_image * len(able))
        for name in able:
            pairs = questions_of(records, name)
            assert [noun for noun, label in pairs if label == "yes"] == images[name][:per_image]
            absent = [noun for noun, label in pairs if label == "no"]
            assert len(set(absent)) == per_image
            assert not set(absent) & set(images[name])


@pytest.mark.parametrize("seed", range(5))
def test_negatives_are_the_first_of_their_ranking(seed: int) -> None:
    """Rankings counted by a naive loop over pairs; where a ranking is exhausted, any absent object counts."""
    images = {name: objects for name, objects in many_images(seed).items() if len(objects) >= 3}
    built = build(images, seed=seed)
    nouns = list(dict.fromkeys(noun for objects in images.values() for noun in objects))

    def frequency(noun: str) -> int:
        return sum(noun in objects for objects in images.values())

    def co_occurrences(noun: str, other: str) -> int:
        return sum(noun in objects and other in objects for objects in images.values())

    for name, objects in images.items():
        for split in ("popular", "adversarial"):
            absent = [noun for noun in nouns if noun not in objects]
            pairs = questions_of(built[split], name)
            for (positive, _), (negative, _) in zip(pairs[::2], pairs[1::2], strict=True):
                counts = {n: frequency(n) if split == "popular" else co_occurrences(positive, n) for n in absent}
                best = max(counts.values())
                assert negative in absent
                assert counts[negative] == best
                absent.remove(negative)


def test_random_is_uniform_over_the_absent() -> None:
    images = {"x.png": ["a", "b", "c"], **{f"{i}.png": ["d", "e", "f", "g"] for i in range(3)}}
    counts = dict.fromkeys("defg", 0)
    for seed in range(400):
        _, (noun, _), *_ = questions_of(build(images, seed=seed)["random"], "x.png")
        counts[noun] += 1
    assert min(counts.values()) > 70


def test_counts_are_those_of_the_sampled_images_only() -> None:
    images = many_images(3)
    for seed in range(5):
        built = build(images, seed=seed, n_images=6)
        names = list(dict.fromkeys(r["image"] for r in built["random"]))
        assert len(names) == 6
        nouns = {noun for name in names for noun in images[str(name)]}
        assert {noun for name in names for noun, _ in questions_of(built["random"], str(name))} <= nouns
        alone = build({str(name): images[str(name)] for name in names})
        firsts = [[questions_of(b["popular"], str(name))[1] for name in names] for b in (built, alone)]
        assert firsts[0] == firsts[1]
    assert build(images, seed=1, n_images=6) == build(images, seed=1, n_images=6)
    assert build(images, seed=1, n_images=6) != build(images, seed=2, n_images=6)


def test_wording_and_doubles() -> None:
    images = {"1.png": ["apple", "apple", "dog", "umbrella"], "2.png": ["cat", "bus", "car"], "3.png": ["dog", "dog"]}
    texts = [r["text"] for r in build(images)["random"] if r["label"] == "yes"]
    assert texts[:3] == [
        "Is there an apple in the image?",
        "Is there a dog in the image?",
        "Is there an umbrella in the image?",
    ]
    assert len(texts) == 6


def test_building_refuses_what_cannot_be_asked() -> None:
    with pytest.raises(DataError, match="3 images with at least 5 different objects are needed, but only 0 qualify"):
        build(IMAGES, per_image=5, n_images=3)
    with pytest.raises(DataError, match="1 image with at least 9"):
        build(IMAGES, per_image=9)
    with pytest.raises(DataError, match=r"image '1.png': each of the 4 objects is in the image"):
        build({"1.png": ["a", "b", "c"], "2.png": ["a", "b", "d"]})
    with pytest.raises(DataError, match=r"image '1.png' has an object without a name"):
        build({"1.png": ["a", " ", "c"]})
    with pytest.raises(ConfigError, match="per_image=0"):
        build(IMAGES, per_image=0)


def test_built_questions_are_read_by_the_loader(tmp_path: Path) -> None:
    images = {**{k: v[:] for k, v in many_images(1).items()}, "sub/ü.png": ["apple", "hot dog", "bus", "car"]}
    (tmp_path / "sub").mkdir()
    for name in images:
        Image.new("RGB", (3, 3)).save(tmp_path / name)
    for split, records in build(images).items():
        path = tmp_path / "questions" / f"made_pope_{split}.json"
        write_questions(path, records)
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
            dict(r) for r in records
        ]
        data = loaders.pope(path, tmp_path)
        expected = [(f"{split}/{r['question_id']}", r["text"], r["label"], r["image"]) for r in records]
        assert [(e.id, e.question, e.answer, e.group) for e in data] == expected
        noun = questions_of(records, "sub/ü.png")[2][0]
        assert noun == "hot dog"
        assert any(e.labels.get("object:hot dog") for e in data)


def test_the_names_are_functions_whatever_is_imported_first() -> None:
    import behavior.chair
    import behavior.pope

    assert callable(behavior.pope)
    assert callable(behavior.chair)
