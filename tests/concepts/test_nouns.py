"""The table of nouns, and every loader and maker of questions that decides with it what is absent."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from activation_store import ActivationStore
from behavior.chair import COCO_CATEGORIES, COCO_SYNONYMS
from behavior.pope import build, questions_about
from concepts import ConceptDataset, loaders
from concepts.loaders.clevr import VALUES
from concepts.nouns import (
    SYNONYMS,
    PresentNouns,
    absence_clause,
    article,
    asked_noun,
    canonical_noun,
    existence_clause,
    existence_question,
    is_the,
    number,
    singular,
)
from diagnosis.claims import claims_of

SINGULARS = """men:man women:woman children:child people:person policemen:policeman mice:mouse geese:goose teeth:tooth
knives:knife calves:calf bookshelves:bookshelf leaves:leaf gloves:glove olives:olive sleeves:sleeve ties:tie pies:pie
puppies:puppy cities:city cookies:cookie doggies:doggie keys:key turkeys:turkey skies:sky buses:bus bus:bus glasses:glass
glass:glass dresses:dress lenses:lens lens:lens cactus:cactus octopuses:octopus tennis:tennis canvas:canvas
benches:bench headaches:headache boxes:box axes:axe tomatoes:tomato shoes:shoe toes:toe photos:photo horses:horse
houses:house vases:vase purses:purse menus:menu skis:skis scissors:scissors jeans:jeans sheep:sheep aircraft:aircraft
specimen:specimen police:police oasis:oasis grass:grass""".split()


@pytest.mark.parametrize("pair", SINGULARS)
def test_singulars(pair: str) -> None:
    noun, single = pair.split(":")
    assert singular(noun) == single
    assert singular(f"old {noun}") == f"old {single}"
    assert singular(single) == single


def test_the_head_of_a_phrase_is_made_singular() -> None:
    assert singular("loaves of bread") == "loaf of bread"
    assert singular("wine glasses") == "wine glass"
    assert number("pair of shoes") == "singular"
    assert number("slices of pizza") == "plural"


@pytest.mark.parametrize(
    ("noun", "question"),
    [
        ("apple", "Is there an apple in the image?"),
        ("dog", "Is there a dog in the image?"),
        ("bus", "Is there a bus in the image?"),
        ("trees", "Are there trees in the image?"),
        ("people", "Are there people in the image?"),
        ("scissors", "Are there scissors in the image?"),
        ("skis", "Are there skis in the image?"),
        ("grass", "Is there grass in the image?"),
        ("broccoli", "Is there broccoli in the image?"),
        ("sheep", "Is there a sheep in the image?"),
        ("hour glass", "Is there an hour glass in the image?"),
        ("unicorn", "Is there a unicorn in the image?"),
        ("uninvited guest", "Is there an uninvited guest in the image?"),
        ("SUV", "Is there an SUV in the image?"),
        ("TV", "Is there a TV in the image?"),
        ("one-way sign", "Is there a one-way sign in the image?"),
        ("eucalyptus", "Is there a eucalyptus in the image?"),
        ("urinal", "Is there a urinal in the image?"),
        ("umbrella", "Is there an umbrella in the image?"),
        ("onion", "Is there an onion in the image?"),
    ],
)
def test_questions_have_the_grammar_of_their_noun(noun: str, question: str) -> None:
    assert existence_question(noun) == question
    assert asked_noun(question) == noun


def test_clauses_agree_with_their_noun() -> None:
    assert (existence_clause("apple"), absence_clause("apple")) == ("there is an apple", "there is no apple")
    assert (existence_clause("bananas"), absence_clause("bananas")) == ("there are bananas", "there are no bananas")
    assert (is_the("man"), is_the("men")) == ("Is the man", "Are the men")


def test_published_wordings_are_read() -> None:
    assert asked_noun("Is there an snowboard in the imange?") == "snowboard"
    assert asked_noun("is there a dining table in the image") == "dining table"
    assert asked_noun("Are there any bananas in the image?") == "bananas"
    assert asked_noun("Is the dog red?") is None


def test_synonyms_name_one_thing() -> None:
    for group in SYNONYMS:
        assert canonical_noun(group[0]) == group[0], group
    assert {canonical_noun(noun) for noun in ("person", "man", "Women", "children", "policemen")} == {"person"}
    assert canonical_noun("televisions") == canonical_noun("TV") == "tv"
    assert canonical_noun("toasters") == "toaster"


def test_categories_of_coco_are_different_nouns() -> None:
    """A closed list of 80 names: none may count as another, or its questions could not be asked."""
    for first, second in combinations(COCO_CATEGORIES, 2):
        assert not PresentNouns([first]).includes(second), (first, second)
    assert set(COCO_SYNONYMS.values()) == set(COCO_CATEGORIES)
    assert len(COCO_CATEGORIES) == 80


@pytest.mark.parametrize(
    ("annotated", "absent", "possible"),
    [
        ("banana", ["apple"], ["bananas"]),
        ("bananas", ["apple"], ["banana"]),
        ("man", ["dog"], ["men", "person", "people", "young woman"]),
        ("person", ["dog"], ["man"]),
        ("tv", ["radio"], ["television", "televisions"]),
        ("coffee table", ["chair"], ["table", "tables", "coffee tables"]),
        ("table", ["chair"], ["coffee table"]),
        ("hot dog", ["dog"], ["hotdogs"]),
        ("teddy bear", ["bear", "panda"], ["teddy bears"]),
        ("slice of pizza", ["bread"], ["slices of pizza", "slice"]),
    ],
)
def test_absent_nouns_given_the_nouns_of_an_image(annotated: str, absent: list[str], possible: list[str]) -> None:
    present = PresentNouns([annotated, "clock"])
    assert [noun for noun in absent if present.includes(noun)] == []
    assert [noun for noun in possible if not present.includes(noun)] == []


# ---- loaders -----------------------------------------------------------------------------------------------------------

NOUNS = {
    "1": ["bananas", "man", "tv", "trees"],
    "2": ["banana", "person", "television", "car"],
    "3": ["tree", "cars", "dog"],
}
SAME = [{"banana", "bananas"}, {"man", "person"}, {"tv", "television"}, {"tree", "trees"}, {"car", "cars"}]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NOUNS:
        Image.new("RGB", (10, 10)).save(folder / f"{name}.jpg")
    return folder


def _written(images: Path, document: object) -> Path:
    path = images.parent / "file.json"
    path.write_text(json.dumps(document))
    return path


def _gqa(images: Path) -> ConceptDataset:
    box = {"x": 1, "y": 1, "w": 5, "h": 5, "attributes": ["red"], "relations": []}
    graphs = {
        image: {"objects": {f"{image}{i}": {"name": noun, **box} for i, noun in enumerate(nouns)}}
        for image, nouns in NOUNS.items()
    }
    return loaders.gqa(_written(images, graphs), images, per_image=4)


def _visual_genome(images: Path) -> ConceptDataset:
    rows = [
        {"image_id": int(image),
         "objects": [{"object_id": 10 * int(image) + i, "x": 1, "y": 1, "w": 5, "h": 5, "names": [noun]}
                     for i, noun in enumerate(nouns)]}
        for image, nouns in NOUNS.items()
    ]  # fmt: skip
    return loaders.visual_genome(_written(images, rows), images, per_image=4)


def _coco(images: Path) -> ConceptDataset:
    """Not COCO's own categories: a user's, in COCO's layout."""
    every = list(dict.fromkeys(noun for nouns in NOUNS.values() for noun in nouns))
    rows = [(image, noun) for image, nouns in NOUNS.items() for noun in nouns]
    document = {
        "images": [{"id": int(image), "file_name": f"{image}.jpg"} for image in NOUNS],
        "categories": [{"id": i, "name": noun} for i, noun in enumerate(every)],
        "annotations": [
            {"id": i, "image_id": int(image), "category_id": every.index(noun), "bbox": [0, 0, 5, 5]}
            for i, (image, noun) in enumerate(rows)
        ],
    }
    return loaders.coco(_written(images, document), images, per_image=4)


@pytest.mark.parametrize("load", [_gqa, _visual_genome, _coco])
def test_nothing_annotated_is_asked_as_absent(images: Path, load: Any) -> None:
    data: ConceptDataset = load(images)
    for example in data.where(kind="existence"):
        noun = asked_noun(example.question)
        assert noun is not None, example.question
        present = {o.noun for o in example.objects}
        same = next((group for group in SAME if noun in group), {noun})
        assert (example.answer == "yes") == bool(present & same), example.question
        for label, truth in example.labels.items():
            noun = label.removeprefix("object:")
            same = next((group for group in SAME if noun in group), {noun})
            assert label == "object:named" or truth == bool(present & same), label
    questions = {e.question for e in data}
    assert "Are there bananas in the image?" in questions
    assert not any(re.match(r"Is there an? (bananas|trees|cars)", q) for q in questions)
    _check_pope(questions_about(data, per_image=2))


def _check_pope(data: ConceptDataset) -> None:
    for example in data:
        noun = asked_noun(example.question)
        assert noun is not None
        same = next((group for group in SAME if noun in group), {noun})
        assert (example.answer == "yes") == bool({o.noun for o in example.objects} & same), example.question
        assert (example.subject is not None) == (example.answer == "yes")
        assert example.labels[f"object:{noun}"] == (example.answer == "yes")


def test_colors_of_plural_things(images: Path) -> None:
    assert "Are the bananas red?" in {e.question for e in _gqa(images).where(kind="color")}
    assert "Is the man red?" in {e.question for e in _gqa(images).where(kind="color")}


def test_present_objects_are_asked_about_where_nothing_is_absent(images: Path) -> None:
    box = {"x": 1, "y": 1, "w": 5, "h": 5, "attributes": [], "relations": []}
    graphs = {"1": {"objects": {"1": {"name": "bananas", **box}}}, "2": {"objects": {"2": {"name": "banana", **box}}}}
    data = loaders.gqa(_written(images, graphs), images)
    assert [(e.question, e.answer) for e in data] == [
        ("Are there bananas in the image?", "yes"),
        ("Is there a banana in the image?", "yes"),
    ]


def test_clevr_asks_with_the_article_of_its_color() -> None:
    colors = VALUES["color"]
    assert {article(f"{color} cube") for color in colors} == {"a"}
    assert article("orange cube") == "an"


def test_pope_does_not_deny_two_names_of_one_thing() -> None:
    images = {"1": ["dog", "cat"], "2": ["tv", "television"], "3": ["tree", "car"]}
    for questions in build(images, per_image=2).values():
        for image in images:
            denied = [str(q["text"]) for q in questions if q["image"] == image and q["label"] == "no"]
            assert len({canonical_noun(asked_noun(text) or "") for text in denied}) == len(denied)


# ---- words of questions ------------------------------------------------------------------------------------------------


def _concepts(labels: list[str], rows: list[tuple[str, str]]) -> list[str]:
    """Return the concept of each question, given as level and text."""
    count = len(rows)
    columns: dict[str, Any] = {
        name: np.array([name] * count) for name in ("id", "group", "kind", "answer", "model_answer")
    }
    columns |= {"level": np.array([level for level, _ in rows]), "question": np.array([text for _, text in rows])}
    columns |= {"answer": np.array(["yes"] * count), "model_answer": np.array(["no"] * count), "margin": np.ones(count)}
    store = cast("ActivationStore", SimpleNamespace(labels=labels, columns={**columns, **dict.fromkeys(labels)}))
    return [claim.concept if claim else "" for claim in claims_of(store)]


def test_questions_are_about_a_label_in_either_number() -> None:
    labels = ["object:banana", "object:trees", "object:bear", "object:teddy bear", "object:x-ray", "attribute:red",
              "relation:to the left of"]  # fmt: skip
    questions = [
        ("object", "Are there bananas in the image?"),
        ("object", "Is there a tree in the image?"),
        ("object", "Are there teddy bears in the image?"),
        ("object", "Is there a bear-shaped cup in the image?"),
        ("object", "Is there an X-ray in the image?"),
        ("attribute", "Are the bananas red?"),
        ("attribute", "Is the shirt reddish?"),
        ("relation", "Is the banana to the left of the bear?"),
    ]
    assert _concepts(labels, questions) == [
        "object:banana", "object:trees", "object:teddy bear", "object:bear-shaped cup", "object:x-ray", "attribute:red", "",
        "relation:to the left of",
    ]  # fmt: skip
