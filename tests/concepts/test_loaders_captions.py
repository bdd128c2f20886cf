"""Loaders of captions and of ready questions: VSR, What'sUp, ARO, SugarCrepe, AMBER, MME."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from concepts import ConceptDataset, loaders
from concepts.loaders.whatsup import preposition
from groundscope.core.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "controlled").mkdir(parents=True)
    picture = Image.new("RGB", (8, 6), "red")
    picture.paste("blue", (4, 0, 8, 6))
    for name in ("a.png", "b.png", "controlled/mug_in-front_of_plate.png", "000000000042.jpg", "42.jpg"):
        picture.save(images / name)
    return images


def write(folder: Path, document: Any, name: str = "file.json") -> Path:
    path = folder.parent / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def questions_and_answers(data: ConceptDataset) -> list[tuple[str, str]]:
    return [(e.question, e.answer) for e in data]


def left_out(data: ConceptDataset) -> Any:
    return data.provenance["left_out"]


# ---- VSR ---------------------------------------------------------------------------------------------------------------

VSR = [
    {"image": "a.png", "image_link": "x", "caption": "The cat is under the bed.", "label": 1, "relation": "Under"},
    {"image": "b.png", "caption": "The dog faces the cat.", "label": 0, "relation": "facing"},
]


def test_vsr(folder: Path) -> None:
    data = loaders.vsr(write(folder, "".join(json.dumps(v) + "\n" for v in VSR), "x.jsonl"), folder)
    assert questions_and_answers(data) == [
        ('Is the statement "The cat is under the bed." true of the image?', "yes"),
        ('Is the statement "The dog faces the cat." true of the image?', "no"),
    ]
    assert {(e.level, e.kind, e.candidates) for e in data} == {("relation", "relation", ("yes", "no"))}
    assert data[0].labels == {"relation:under": True, "relation:named": True}
    assert data[1].labels == {"relation:facing": False, "relation:named": False}
    assert [e.group for e in data] == ["a.png", "b.png"]
    short = loaders.vsr(write(folder, VSR), folder, limit=1)
    assert left_out(short) == {"captions beyond the limit": 1}


# ---- What'sUp ----------------------------------------------------------------------------------------------------------

OPTIONS = [f"A mug {p} a plate" for p in ("in front of", "behind", "left of", "right of")]
CONTROLLED = [{"image_path": "data/controlled/mug_in-front_of_plate.png", "caption_options": OPTIONS}]


def test_whatsup_controlled_images(folder: Path) -> None:
    data = loaders.whatsup(write(folder, CONTROLLED), folder)
    (yes, no) = questions_and_answers(data)
    assert yes == ('Is the statement "A mug in front of a plate" true of the image?', "yes")
    assert no[1] == "no"
    assert any(f'"{option}"' in no[0] for option in OPTIONS[1:])
    assert data[0].labels == {"relation:in front of": True, "relation:named": True}
    assert data[0].group == "controlled/mug_in-front_of_plate.png"
    assert left_out(data)["false captions without a question"] == 2
    assert preposition("x/can_left_of_table.jpeg") == "left of"
    assert preposition("42.jpg") is None


def test_whatsup_by_letter(folder: Path) -> None:
    many = [{**CONTROLLED[0]} for _ in range(40)]
    data = loaders.whatsup(write(folder, many), folder, form="choice")
    assert {e.candidates for e in data} == {("A", "B", "C", "D")}
    for e in data:
        assert f"{e.answer}: A mug in front of a plate" in e.question
        assert e.question.endswith("Answer with A, B, C or D.")
        for option in OPTIONS:
            assert option in e.question
    # The right letter must not be the same one always.
    assert {e.answer for e in data} == {"A", "B", "C", "D"}
    assert [e.answer for e in loaders.whatsup(write(folder, many[:7]), folder, form="choice")] == [
        e.answer for e in data[:7]
    ]


@pytest.mark.parametrize(
    ("name", "kind", "image"),
    [
        ("coco_qa_one_obj.json", None, "000000000042.jpg"),
        ("vg_qa_two_obj.json", None, "42.jpg"),
        ("x.json", "vg", "42.jpg"),
    ],
)
def test_whatsup_from_image_ids(folder: Path, name: str, kind: str | None, image: str) -> None:
    rows = [[42, "A dog on the left", "A dog on the right"]]
    data = loaders.whatsup(write(folder, rows, name), folder, names=kind)
    assert [(e.answer, e.group) for e in data] == [("yes", image), ("no", image)]
    assert data[0].labels == {"relation:named": True}


# ---- ARO and SugarCrepe ------------------------------------------------------------------------------------------------

BOX = {"bbox_x": 4, "bbox_y": 0, "bbox_w": 4, "bbox_h": 3}
RELATION = {"image_path": "a.png", **BOX, "true_caption": "the man is behind the horse",
            "false_caption": "the horse is behind the man", "relation_name": "behind"}  # fmt: skip
ATTRIBUTE = {"image_path": "b.png", **BOX, "true_caption": "the wet dog and the red car",
             "false_caption": "the red dog and the wet car", "attributes": ["wet", "red"]}  # fmt: skip


def test_aro(folder: Path) -> None:
    data = loaders.aro(write(folder, [RELATION, ATTRIBUTE]), folder)
    assert questions_and_answers(data)[:2] == [
        ('Is the statement "the man is behind the horse" true of the image?', "yes"),
        ('Is the statement "the horse is behind the man" true of the image?', "no"),
    ]
    assert [(e.level, e.group) for e in data] == [("relation", "a.png")] * 2 + [("attribute", "b.png")] * 2
    assert data[0].labels == {"relation:behind": True, "relation:named": True}
    assert data[3].labels == {"attribute:wet": True, "attribute:red": True, "attribute:named": False}
    picture = data[0].image.load()
    assert (picture.size, picture.getpixel((0, 0)), picture.getpixel((3, 2))) == ((4, 3), (0, 0, 255), (0, 0, 255))
    whole = json.loads(data[0].image.identity)
    assert whole["crop"] == [4, 0, 8, 3]
    assert data[0].image.identity != data[2].image.identity
    beyond = {**RELATION, "bbox_x": 90}
    with pytest.raises(DataError, match="8 x 6 pixels does not overlap the box"):
        loaders.aro(write(folder, [beyond]), folder)[0].image.load()
    letters = loaders.aro(write(folder, [RELATION]), folder, form="choice")
    assert letters[0].candidates == ("A", "B")
    assert f"{letters[0].answer}: the man is behind the horse" in letters[0].question


@pytest.mark.parametrize(
    ("name", "level"),
    [("replace_att.json", "attribute"), ("swap_obj.json", "object"), ("replace_rel.json", "relation")],
)
def test_sugarcrepe(folder: Path, name: str, level: str) -> None:
    rows = {str(i): {"filename": "a.png", "caption": "A red cup", "negative_caption": "A blue cup"} for i in range(2)}
    data = loaders.sugarcrepe(write(folder, rows, name), folder)
    assert {(e.level, e.kind) for e in data} == {(level, name.removesuffix(".json"))}
    assert [e.answer for e in data] == ["yes", "no"] * 2
    assert data[0].id == f"{name.removesuffix('.json')}/0/true"
    assert loaders.sugarcrepe(write(folder, list(rows.values()), name), folder).digest == data.digest
    custom = loaders.sugarcrepe(write(folder, rows, "mine.json"), folder, level="object")
    assert {e.level for e in custom} == {"object"}
    with pytest.raises(ConfigError, match=r"name of 'mine\.json' does not end in _obj, _att or _rel"):
        loaders.sugarcrepe(write(folder, rows, "mine.json"), folder)


# ---- AMBER and MME -----------------------------------------------------------------------------------------------------

QUERIES = [{"id": i, "image": "a.png", "query": f"Question {i}?"} for i in (1, 3, 2, 4)]
TRUTHS: list[dict[str, Any]] = [
    {"id": 1, "type": "generative", "truth": ["dog", "bed"], "hallu": ["cat"]},
    {"id": 2, "type": "discriminative-attribute-number", "truth": "No"},
    {"id": 3, "type": "discriminative-hallucination", "truth": "yes"},
    {"id": 4, "type": "discriminative-relation", "truth": "no"},
]


def test_amber(folder: Path) -> None:
    truths = write(folder, TRUTHS, "annotations.json")
    data = loaders.amber(write(folder, QUERIES), folder, truths)
    assert [(e.id, e.level, e.kind, e.answer, e.candidates) for e in data] == [
        ("1", "object", "caption", "dog, bed", ()),
        ("3", "object", "existence", "yes", ("yes", "no")),
        ("2", "attribute", "number", "no", ("yes", "no")),
        ("4", "relation", "relation", "no", ("yes", "no")),
    ]
    for rows, words in (
        ([{**QUERIES[0], "id": 9}], "no annotation with id '9'; .* has the annotations 1 to 4"),
        ([QUERIES[0], QUERIES[0]], "record 2: field 'id': 1 was already used, at .* record 1"),
    ):
        with pytest.raises(DataError, match=words):
            loaders.amber(write(folder, rows), folder, truths)
    for truth, words in (
        ({"type": "smell", "truth": "no"}, "record 1: field 'type' is 'smell'; choose from generative"),
        ({"type": "discriminative-relation", "truth": "oui"}, "record 1: field 'truth' is 'oui', neither"),
    ):
        with pytest.raises(DataError, match=words):
            loaders.amber(write(folder, QUERIES[:1]), folder, write(folder, [truth], "annotations.json"))


MME = "a.png\tIs there a dog? Please answer yes or no.\tYes\na.png\tIs there a cat?\tno\tYes\n\n"


def test_mme(folder: Path) -> None:
    data = loaders.mme(write(folder, MME, "existence.txt"), folder)
    assert [(e.id, e.level, e.kind, e.answer) for e in data] == [
        ("existence/1", "object", "existence", "yes"),
        ("existence/2", "object", "existence", "no"),
    ]
    assert data[0].question == "Is there a dog? Please answer yes or no."
    tasks = folder.parent / "tasks"
    tasks.mkdir()
    (folder / "position").mkdir()
    (folder / "a.png").rename(folder / "position" / "a.png")
    (tasks / "position.txt").write_text(MME)
    (tasks / "code_reasoning.txt").write_text(MME)
    data = loaders.mme(tasks, folder)
    assert {(e.level, e.group) for e in data} == {("relation", "position/a.png")}
    assert left_out(data)["questions of cognition"] == 2


Loader = Callable[..., ConceptDataset]
BAD: dict[str, tuple[Loader, str, Any, str]] = {
    "VSR label": (loaders.vsr, "x.jsonl", [{**VSR[0], "label": "1"}], "record 1: field 'label' is '1', neither 0 nor 1"),
    "VSR label is true": (loaders.vsr, "x.jsonl", [{**VSR[0], "label": True}], "field 'label' is 'True'"),
    "VSR relation": (loaders.vsr, "x.jsonl", [{**VSR[0], "relation": ""}], "field 'relation' must hold text"),
    "VSR image": (loaders.vsr, "x.jsonl", [VSR[0], {**VSR[1], "image": "c.png"}], "record 2: field 'image': .*not exist"),
    "VSR cut": (loaders.vsr, "x.jsonl", json.dumps(VSR)[:-30], r"x\.jsonl: record 2: .*the file ends inside this entry"),
    "leaves folder": (loaders.vsr, "x.jsonl", [{**VSR[0], "image": "../x"}], "field 'image': image path .* leaves"),
    "nothing": (loaders.vsr, "x.jsonl", [], "the file gives no question"),
    "one option": (loaders.whatsup, "x.json", [{**CONTROLLED[0], "caption_options": ["A"]}], "a true caption and at least"),
    "options alike": (loaders.whatsup, "x.json", [{**CONTROLLED[0], "caption_options": ["A", "A "]}], "must differ"),
    "two values": (loaders.whatsup, "coco_x.json", [[1, "a"]], "record 1: expected an image id, .* found 2 values"),
    "id is no number": (loaders.whatsup, "coco_x.json", [["x", "a", "b"]], "image id 'x' needs names='coco'"),
    "no names": (loaders.whatsup, "x.json", [[42, "a", "b"]], "image id '42' needs names='coco' or names='vg'"),
    "no record": (loaders.whatsup, "x.json", ["a"], "record 1: expected a JSON object with fields, found \"a\""),
    "no box": (loaders.aro, "x.json", [{**RELATION, "bbox_w": 0}], "field 'bbox_w' or 'bbox_h': a box of 0 x 3"),
    "box of words": (loaders.aro, "x.json", [{**RELATION, "bbox_x": "4"}], "field 'bbox_x' must hold a number"),
    "about nothing": (loaders.aro, "x.json", [{**BOX, "image_path": "a.png"}], "no field 'attributes'"),
    "captions alike": (loaders.aro, "x.json", [{**RELATION, "false_caption": RELATION["true_caption"]}], "must differ"),
    "no file name": (loaders.sugarcrepe, "x_att.json", {"0": {}}, "record .0.: no field .filename."),
    "columns": (loaders.mme, "existence.txt", "a.png\tIs it?\n", r"existence\.txt: line 1: 2 tab-separated columns"),
    "answer": (loaders.mme, "existence.txt", "a.png\tIs it?\toui\n", "line 1: field 'answer' is 'oui', neither"),
    "asked twice": (loaders.mme, "existence.txt", MME + MME, "line 4: the question .* is repeated, first at .* line 1"),
    "subtask": (loaders.mme, "smell.txt", MME, "unknown subtask 'smell'; choose from existence, count"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_their_place(folder: Path, case: str) -> None:
    loader, name, document, words = BAD[case]
    with pytest.raises(DataError, match=words):
        loader(write(folder, document, name), folder)


@pytest.mark.parametrize("name", sorted(loaders.LOADERS))
def test_every_loader_names_unreadable_files_and_checks_its_options(folder: Path, name: str) -> None:
    loader = loaders.LOADERS[name]
    more = (folder / "none.json",) if name == "amber" else ()
    path = folder / ("none_att.json" if name == "sugarcrepe" else "existence.txt" if name == "mme" else "none.json")
    with pytest.raises(DataError, match="cannot be read"):
        loader(path, folder, *more)
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        loader(path, folder / "none", *more)
    with pytest.raises(ConfigError, match="limit=0"):
        loader(path, folder, *more, limit=0)
    if name in {"aro", "whatsup", "sugarcrepe"}:
        with pytest.raises(ConfigError, match="unknown form 'x'; choose from yes_no, choice"):
            loader(path, folder, form="x")
