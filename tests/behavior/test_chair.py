"""CHAIR against small examples worked by hand from the paper's definitions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from behavior import BehaviorResult, chair
from behavior.answer_files import row_of
from behavior.chair import COCO_PHRASES, read_synonyms, score_captions
from behavior.parsing import PARSERS
from behavior.result import Cost
from concepts import AnnotatedObject, ConceptDataset, Example, scenes
from concepts.annotated_object import Box
from groundscope.core.errors import ConfigError, DataError


def test_two_captions_by_hand() -> None:
    """Four objects are mentioned and one is not there; one caption of two has it."""
    captions = {"1": "A cat sits beside a dog.", "2": "A car next to a bus."}
    result = chair(captions, {"1": ["cat", "dog"], "2": ["car", "tree"]}, vocabulary=["bus"], variant="paper")
    assert result.chair_i.value == pytest.approx(1 / 4)
    assert result.chair_s.value == pytest.approx(1 / 2)
    assert result.recall.value == pytest.approx(3 / 4)
    assert result.captions[1].mentioned == ("car", "bus")
    assert result.captions[1].hallucinated == ("bus",)
    assert result.captions[1].missed == ("tree",)
    for estimate in (result.chair_i, result.chair_s, result.recall):
        assert 0 <= estimate.low < estimate.value < estimate.high <= 1
    assert result.frame()["id"].tolist() == ["1", "2"]


def test_an_object_counts_once_or_once_per_mention() -> None:
    captions = {"1": "A truck, a red truck and two trucks by a car."}
    objects = {"1": ["car"]}
    assert chair(captions, objects, vocabulary=["truck"]).chair_i.value == pytest.approx(3 / 4)
    assert chair(captions, objects, vocabulary=["truck"], variant="paper").chair_i.value == pytest.approx(1 / 2)


def test_synonyms_and_plurals() -> None:
    synonyms = {"puppy": "dog", "man": "person", "Traffic Signal": "traffic light"}
    captions = {
        "1": "Two puppies, three men and a man watch the traffic signals; knives, leaves, glasses and cherries."
    }
    nouns = ["knife", "leaf", "glass", "cherry"]
    result = chair(captions, {"1": ["Puppy", "man"]}, synonyms, vocabulary=nouns, variant="paper")
    assert result.captions[0].mentioned == (
        "dog", "person", "person", "traffic light", "knife", "leaf", "glass", "cherry",
    )  # fmt: skip
    assert result.recall.value == 1.0
    assert result.chair_i.value == pytest.approx(5 / 7)


def test_the_longest_words_win() -> None:
    result = chair({"1": "A hot dog, and a t-shirt's dog"}, {"1": ["hot dog", "T-shirt"]}, vocabulary=["dog"])
    assert result.captions[0].mentioned == ("hot dog", "t-shirt", "dog")
    assert result.captions[0].hallucinated == ("dog",)


def test_words_within_words_are_no_objects() -> None:
    result = chair({"1": "A carpet, a category and a scar"}, {"1": ["car", "cat"]})
    assert result.captions[0].mentioned == ()
    assert math.isnan(result.chair_i.value)
    assert (result.chair_s.value, result.recall.value) == (0, 0)


def test_plural_names_are_themselves() -> None:
    """A word of the vocabulary is never cut: scissors are no scissor, and a bus is no bu."""
    result = chair({"1": "scissors and a bus"}, {"1": ["scissors", "bus", "bu"]}, variant="paper")
    assert result.captions[0].mentioned == ("scissors", "bus")


def test_only_known_words_are_objects() -> None:
    captions, objects = {"1": "a car and a zebra"}, {"1": ["car"], "2": ["dog"]}
    assert chair(captions, objects).chair_s.value == 0
    assert chair(captions, objects, vocabulary=["zebra"]).chair_s.value == 1
    assert chair({"1": "a dog"}, objects).chair_s.value == 1  # shown by another image


def test_intervals_are_over_images() -> None:
    captions = {str(i): "a car and a truck" for i in range(40)}
    objects = {str(i): ["car", "truck"] if i % 2 else ["car"] for i in range(40)}
    result = chair(captions, objects)
    assert result.chair_s.value == 0.5
    assert 0.3 < result.chair_s.low < 0.42
    assert result.chair_i.value == 0.25
    assert result.chair_i.high - result.chair_i.low == pytest.approx(
        (result.chair_s.high - result.chair_s.low) / 2, rel=0.15
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="no captions"):
        chair({}, {})
    with pytest.raises(DataError, match="caption of image '2'"):
        chair({"1": "a", "2": "b"}, {"1": []})
    with pytest.raises(ConfigError, match="unknown variant 'new'; choose from release, paper"):
        chair({"1": "a"}, {"1": []}, variant="new")
    with pytest.raises(ConfigError, match="a word maps to 'dog', which maps to 'animal'"):
        chair({"1": "a"}, {"1": []}, {"puppy": "dog", "dog": "animal"})


# ---- COCO's synonyms and pairs of words --------------------------------------------------------------------------------

SYNONYMS = """person, man, boy, baby, passenger, person
dog, puppy
bear, cub
bird
train
airplane, jet, air plane

chair, seat
toilet
tie, bow
laptop, computer
"""


@pytest.fixture
def synonyms(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "synonyms.txt"
    path.write_text(SYNONYMS)
    return read_synonyms(path)


def test_synonyms_are_read_as_the_release_writes_them(synonyms: dict[str, str], tmp_path: Path) -> None:
    assert len(synonyms) == 21
    assert synonyms["man"] == synonyms["person"] == "person"
    assert synonyms["air plane"] == "airplane"
    path = tmp_path / "synonyms.txt"
    for text, words in (
        ("dog, puppy\ncat, puppy\n", r"line 2: 'puppy' already means another object, in line 1"),
        (", puppy\n", "line 1 does not begin with the name of an object"),
        ("\n", "the file contains no objects"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_synonyms(path)
    path.write_bytes(b"dog, \xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 5"):
        read_synonyms(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_synonyms(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("caption", "mentioned", "without"),
    [
        ("A baby bird and a baby", ("bird", "person"), ("person", "bird", "person")),
        ("Two adult dogs", ("dog",), ("dog",)),
        ("a passenger jet, a passenger train, passengers", ("airplane", "train", "person"),
         ("person", "airplane", "person", "train", "person")),
        ("a toilet seat", ("toilet",), ("toilet", "chair")),
        ("A toilet with its seat up by a seat", ("toilet",), ("toilet", "chair", "chair")),
        ("a seat", ("chair",), ("chair",)),
        ("a man in a bow tie", ("person", "tie"), ("person", "tie", "tie")),
        ("a laptop computer", ("laptop",), ("laptop", "laptop")),
        ("a baby animal beside a bear cub", ("bear", "bear"), ("person", "bear", "bear")),
    ],
)  # fmt: skip
def test_pairs_of_words(
    synonyms: dict[str, str], caption: str, mentioned: tuple[str, ...], without: tuple[str, ...]
) -> None:
    assert chair({"1": caption}, {"1": ()}, synonyms, phrases=COCO_PHRASES).captions[0].mentioned == mentioned
    assert chair({"1": caption}, {"1": ()}, synonyms).captions[0].mentioned == without


def test_the_papers_example_with_synonyms(synonyms: dict[str, str]) -> None:
    """Two captions, four objects, one of them not there: CHAIR_i 1/4, CHAIR_s 1/2."""
    captions = {"1": "A boy throws a ball to his puppy.", "2": "A passenger jet over a train"}
    objects = {"1": ["person", "dog"], "2": ["airplane"]}
    result = chair(captions, objects, synonyms, phrases=COCO_PHRASES)
    assert (result.chair_i.value, result.chair_s.value) == (1 / 4, 1 / 2)
    assert result.captions[1].hallucinated == ("train",)


def test_objects_of_reference_captions_count_as_present(synonyms: dict[str, str]) -> None:
    image = scenes.dataset(10)[0].image
    things = (AnnotatedObject("1", "dog", Box(0, 0, 1, 1)),)
    example = Example("7/caption", image, "Describe the image.", "A man walks a puppy. A dog on a leash.", (), "object",
                    "caption", "caption", "7.jpg", objects=things)  # fmt: skip
    data = ConceptDataset("coco", (example,))
    caption = row_of(example, "A boy and his dog on a train", PARSERS["strict"])
    answers = BehaviorResult((caption,), Cost(None, None, 1))
    result = score_captions(answers, data, synonyms, phrases=COCO_PHRASES)
    assert result.captions[0].hallucinated == ("train",)
    assert result.chair_i.value == pytest.approx(1 / 3)
    assert result.recall.value == 1
    with pytest.raises(DataError, match="caption '7/caption' is not in dataset 'other'"):
        score_captions(answers, ConceptDataset("other", ()), synonyms)
    with pytest.raises(DataError, match="no captions among the answers"):
        score_captions(BehaviorResult((), Cost(None, None, 0)), data)


def test_captions_and_objects_of_another_type_are_named() -> None:
    from typing import Any

    captions: Any = {"1": "A dog.", "2": None}
    with pytest.raises(DataError, match="caption of image '2': it must be text, not NoneType"):
        chair(captions, {"1": ["dog"], "2": []}, {"dog": "dog"})
    with pytest.raises(DataError, match="objects of image '1': give a list of nouns, not one text"):
        chair({"1": "A dog."}, {"1": "dog"}, {"dog": "dog"})
