"""Loaders that make questions of annotations: COCO, GQA, Visual Genome, CLEVR, on files small enough to read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from concepts import ConceptDataset, loaders
from concepts.annotated_object import Box
from concepts.reading.annotation_questions import COLORS
from groundscope.core.errors import ConfigError, DataError

COCO: dict[str, Any] = {
    "info": {"year": 2017},
    "images": [
        {"id": 1, "file_name": "a.png"},
        {"id": 2, "file_name": "b.png"},
        {"id": 3, "file_name": "c.png"},
    ],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2]], "iscrowd": 0},
        {"id": 11, "image_id": 1, "category_id": 1, "bbox": [0.5, 0, 2, 2], "iscrowd": 1},
        {"id": 12, "image_id": 1, "category_id": 3, "bbox": [5, 5, 1, 1]},
        {"id": 13, "image_id": 2, "category_id": 4, "bbox": [0, 0, 1, 1]},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 4, "name": "hot dog"}],
}
CAPTIONS = {"annotations": [{"image_id": 1, "caption": "A car."}, {"image_id": 1, "caption": "A man by a car. "},
                            {"image_id": 9, "caption": "x"}]}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png", "c.png", "1.jpg", "2.jpg"):
        Image.new("RGB", (8, 8), "red").save(images / name)
    return images


def write(folder: Path, document: Any, name: str = "file.json") -> Path:
    path = folder.parent / name
    path.write_text(json.dumps(document))
    return path


def changed(key: str, number: int, **values: object) -> dict[str, Any]:
    """Return COCO with fields of one record changed; None takes a field away."""
    rows = [dict(row) for row in COCO[key]]
    rows[number] = {k: v for k, v in {**rows[number], **values}.items() if v is not None}
    return {**COCO, key: rows}


def left_out(data: ConceptDataset) -> Any:
    return data.provenance["left_out"]


def balanced(data: ConceptDataset) -> bool:
    """Say whether each level and kind of yes-no question has as many yes as no."""
    counts = Counter((e.level, e.kind, e.answer) for e in data if e.candidates)
    return all(counts[level, kind, "yes"] == counts[level, kind, "no"] for level, kind, _ in counts)


# ---- COCO --------------------------------------------------------------------------------------------------------------


def test_coco_by_hand(folder: Path) -> None:
    data = loaders.coco(write(folder, COCO), folder)
    assert [(e.question, e.answer) for e in data if e.answer == "yes"] == [
        ("Is there a car in the image?", "yes"),
        ("Is there a hot dog in the image?", "yes"),
    ]
    assert {(e.group, e.question) for e in data if e.answer == "no"} >= {("a.png", "Is there a hot dog in the image?")}
    first = data[0]
    assert (first.level, first.kind, first.split, first.group) == ("object", "existence", "random", "a.png")
    assert dict(first.labels) == {
        "object:person": True, "object:car": True, "object:hot dog": False, "object:named": True,
    }  # fmt: skip
    assert len(first.labels) == 4
    assert [(o.noun, o.box) for o in first.objects] == [
        ("car", Box(1, 2, 4, 6)), ("person", Box(0.5, 0, 2.5, 2)), ("car", Box(5, 5, 6, 6)),
    ]  # fmt: skip
    named = first.named_object()
    assert named is not None
    assert named.id == "10"
    assert data.frame()["object:person"].tolist() == [1, 1, 0, 0]
    # One noun is absent of image a, two of image b: of a's two objects one is not asked about.
    assert {reason: count for reason, count in left_out(data).items() if count} == {
        "images without objects": 1,
        "present objects without an absent object for a pair of questions": 1,
    }


def test_coco_in_any_order_and_with_captions(folder: Path) -> None:
    turned = dict(reversed(COCO.items()))
    plain = loaders.coco(write(folder, COCO), folder)
    assert loaders.coco(write(folder, turned), folder).digest == plain.digest
    captions = write(folder, CAPTIONS, "captions.json")
    data = loaders.coco(write(folder, COCO), folder, captions)
    (caption,) = data.where(kind="caption")
    assert (caption.question, caption.answer, caption.candidates) == (
        "Describe the image.",
        "A car.\nA man by a car.",
        (),
    )
    assert {o.noun for o in caption.objects} == {"car", "person"}
    assert left_out(data)["captions of images that are left out"] == 1
    assert left_out(data)["images without captions"] == 1
    assert len(data.provenance["files"]) == 2


def test_a_limit_counts_images_and_a_seed_decides_the_absent(folder: Path) -> None:
    data = loaders.coco(write(folder, COCO), folder, limit=1)
    assert {e.group for e in data} == {"a.png"}
    assert left_out(data)["images beyond the limit"] == 1
    many = {**COCO, "categories": [*COCO["categories"], *({"id": 100 + i, "name": f"thing{i}"} for i in range(40))]}
    file = write(folder, many)
    digests = [loaders.coco(file, folder, seed=s).digest for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert balanced(loaders.coco(file, folder))
    for e in loaders.coco(file, folder, per_image=2):
        noun = e.question.removeprefix("Is there a ").removesuffix(" in the image?")
        assert (noun in {o.noun for o in e.objects}) == (e.answer == "yes")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "image id": (changed("images", 0, id="x"), "images, record 1: field 'id' must hold a whole number, not 'x'"),
    "image twice": (changed("images", 1, id=1), "images, record 2: field 'id': 1 was already used"),
    "no file name": (changed("images", 0, file_name=None), "images, record 1: no field 'file_name'; it has 'id'"),
    "leaves folder": (changed("images", 0, file_name="../x"), "images, record 1: field 'file_name': image path .* leaves"),
    "no image": (changed("images", 1, file_name="d.png"), "images, record 2: field 'file_name': .*does not exist"),
    "three numbers": (changed("annotations", 2, bbox=[1, 2, 3]), "annotations, record 3: field 'bbox' must hold x, y"),
    "no number": (changed("annotations", 0, bbox=[1, 2, "3", 4]), "annotations, record 1: field 'w' must hold a number"),
    "infinite": (changed("annotations", 0, bbox=[1, 2, 1e400, 4]), "invalid JSON|'w' must hold a number"),
    "unknown image": (changed("annotations", 1, image_id=7), "annotation 11: field 'image_id' is 7, .* 3 images"),
    "unknown category": (changed("annotations", 1, category_id=7), "annotation 11: field 'category_id' is 7, .*1, 3, 4"),
    "annotation twice": (changed("annotations", 3, id=10), "annotation 10: this id was already used"),
    "no category": (changed("annotations", 0, category_id=None), "annotations, record 1: no field 'category_id'"),
    "no categories": ({k: v for k, v in COCO.items() if k != "categories"}, "the list 'categories' is missing or empty"),
    "nothing": ({"info": {}}, "the list 'images' is missing or empty; an instances file has"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_coco_files_are_refused_with_their_place(folder: Path, case: str) -> None:
    document, words = BAD[case]
    with pytest.raises(DataError, match=words):
        loaders.coco(write(folder, document), folder)


def test_a_file_cut_in_the_middle_is_refused(folder: Path) -> None:
    path = write(folder, COCO)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(
        DataError, match=r"file\.json: annotations, record 2: .* at byte \d+: the file ends inside this entry"
    ):
        loaders.coco(path, folder)
    with pytest.raises(ConfigError, match="per_image=0"):
        loaders.coco(path, folder, per_image=0)
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        loaders.coco(path, folder / "none")


# ---- GQA and Visual Genome ---------------------------------------------------------------------------------------------

GRAPHS: dict[str, Any] = {
    "1": {
        "width": 8, "height": 8,
        "objects": {
            "o1": {"name": "apple", "x": 0, "y": 1, "w": 2, "h": 3, "attributes": ["green", "round"],
                   "relations": [{"name": "to the left of", "object": "o2"}, {"name": "near", "object": "o2"}]},
            "o2": {"name": "Cup", "x": 4, "y": 4, "w": 2, "h": 2, "attributes": ["white", "red"],
                   "relations": {"r": {"name": "to the right of", "object": "o1"}}},
            "o3": {"name": "tree", "x": 0, "y": 0, "w": 1, "h": 1, "attributes": ["grey"], "relations": []},
            "o4": {"name": "tree", "x": 1, "y": 0, "w": 1, "h": 1,
                   "relations": [{"name": "behind", "object": "o1"}]},
        },
    },
    "2": {"objects": {"p1": {"name": "dog", "x": 0, "y": 0, "w": 1, "h": 1}}},
}  # fmt: skip


def test_gqa_by_hand(folder: Path) -> None:
    data = loaders.gqa(write(folder, GRAPHS), folder)
    first = [e for e in data if e.group == "1.jpg"]
    colors = [e for e in first if e.kind == "color"]
    # The cup has two colors, the trees are two: only the apple's color can be asked.
    assert next((e.question, e.answer) for e in colors) == ("Is the apple green?", "yes")
    assert len(colors) == 2
    assert colors[1].answer == "no"
    assert colors[1].question.removeprefix("Is the apple ").removesuffix("?") in set(COLORS) - {"green"}
    assert colors[0].labels["attribute:green"] is True
    assert colors[1].labels == {**colors[0].labels, "attribute:named": False}
    assert ("Is the apple round?", "yes") in {(e.question, e.answer) for e in first if e.kind == "shape"}
    relations = {e.question: e.answer for e in first if e.kind == "relation"}
    assert relations == {
        "Is the apple to the left of the cup?": "yes", "Is the apple to the right of the cup?": "no",
        "Is the cup to the right of the apple?": "yes", "Is the cup to the left of the apple?": "no",
    }  # fmt: skip
    existence = [e.question for e in first if e.kind == "existence"]
    assert existence == ["Is there an apple in the image?", "Is there a dog in the image?"]
    assert left_out(data)["present objects without an absent object for a pair of questions"] == 2
    assert balanced(data)
    assert {e.subject for e in colors} == {"o1"}
    assert first[0].objects[0].attributes == {"round": "round", "shape": "round", "color": "green"}
    counts = left_out(data)
    assert counts["attributes that are not colors and exclude no other"] == 0
    assert counts["objects with several colors"] == 1
    assert counts["colors of objects whose noun is not unique"] == 1
    assert counts["relations without opposite"] == 1
    assert counts["relations of objects whose noun is not unique"] == 1


def test_gqa_relations_that_contradict_are_not_asked(folder: Path) -> None:
    graphs = json.loads(json.dumps(GRAPHS))
    graphs["1"]["objects"]["o2"]["relations"] = [{"name": "to the left of", "object": "o1"}]
    data = loaders.gqa(write(folder, graphs), folder)
    assert not len(data.where(kind="relation"))
    assert left_out(data)["relations that contradict another"] == 2


def test_gqas_own_questions(folder: Path) -> None:
    questions = {
        "q1": {"imageId": "1", "question": "Is the apple green?", "answer": "Yes", "types": {"semantic": "attr"}},
        "q2": {"imageId": "2", "question": "Is there a cat?", "answer": "no", "types": {"semantic": "obj"}},
        "q3": {"imageId": "1", "question": "What is it?", "answer": "apple", "types": {"semantic": "cat"}},
        "q4": {"imageId": "1", "question": "Is it left?", "answer": "no", "types": {"semantic": "rel"}},
    }
    data = loaders.gqa(write(folder, GRAPHS), folder, write(folder, questions, "questions.json"))
    assert [(e.id, e.level, e.kind, e.answer) for e in data] == [
        ("q1", "attribute", "gqa_attr", "yes"), ("q2", "object", "gqa_obj", "no"), ("q4", "relation", "gqa_rel", "no"),
    ]  # fmt: skip
    assert left_out(data)["questions not answered yes or no"] == 1
    questions["q1"]["types"] = {"semantic": "smell"}
    with pytest.raises(DataError, match="record 'q1': field 'types': semantic is 'smell'; choose from obj"):
        loaders.gqa(write(folder, GRAPHS), folder, write(folder, questions, "questions.json"))
    questions = {"q9": {"imageId": "77", "question": "?", "answer": "yes", "types": {"semantic": "obj"}}}
    with pytest.raises(DataError, match=r"record 'q9': field 'imageId': image .*77\.jpg' does not exist"):
        loaders.gqa(write(folder, GRAPHS), folder, write(folder, questions, "questions.json"))


def own_question(semantic: str, answer: str, **annotations: Any) -> dict[str, Any]:
    about = {"imageId": "1", "question": "?", "answer": answer, "types": {"semantic": semantic}}
    return {**about, "annotations": {"answer": {}, "fullAnswer": {}, "question": annotations.get("question", {})}}


def test_the_subject_of_gqas_own_questions_is_the_object_that_they_name(folder: Path) -> None:
    for semantic, answer, named, subject in (
        ("attr", "yes", {"2": "o1"}, "o1"),
        ("rel", "no", {"10": "o1", "2:4": "o2"}, "o2"),
        ("rel", "no", {"2": "o9", "6": "o2"}, "o2"),
        ("attr", "no", {"2": "o9"}, None),
        ("obj", "yes", {"3": "o1"}, "o1"),
        # What is asked for is not there; the object that is named is another.
        ("obj", "no", {"3": "o1"}, None),
        ("attr", "yes", {}, None),
    ):
        document = {"q": own_question(semantic, answer, question=named)}
        data = loaders.gqa(write(folder, GRAPHS), folder, write(folder, document, "questions.json"))
        assert data[0].subject == subject
    document = {"q": own_question("attr", "yes", question={"2": "o1"})}
    (example,) = loaders.gqa(write(folder, GRAPHS), folder, write(folder, document, "questions.json"))
    thing = example.named_object()
    assert thing is not None
    x, y, w, h = (GRAPHS["1"]["objects"]["o1"][side] for side in "xywh")
    assert thing.box == Box(x, y, x + w, y + h)
    for wrong, words in (
        ({"x": "o1"}, "annotations, question: 'x' is not an index of words"),
        ({"2": None}, "annotations, question: field '2' must hold text, not null"),
        ([1], "annotations, question: expected a JSON object"),
    ):
        document = {"q": own_question("attr", "yes", question=wrong)}
        with pytest.raises(DataError, match=rf"questions\.json: record 'q', {words}"):
            loaders.gqa(write(folder, GRAPHS), folder, write(folder, document, "questions.json"))


def test_gqas_own_questions_without_a_scene_graph_are_kept(folder: Path) -> None:
    document = {f"q{i}": {**own_question("attr", "yes", question={"2": "o1"}), "imageId": i} for i in ("2", "1")}
    graphs = write(folder, {"1": GRAPHS["1"]}, "graphs.json")
    questions = write(folder, document, "questions.json")
    data = loaders.gqa(graphs, folder, questions)
    assert [(e.id, e.group, len(e.objects), e.subject) for e in data] == [
        ("q2", "2.jpg", 0, None), ("q1", "1.jpg", len(GRAPHS["1"]["objects"]), "o1"),
    ]  # fmt: skip
    assert data.provenance["without_scene_graph"] == 1
    short = loaders.gqa(graphs, folder, questions, limit=1)
    assert [e.id for e in short] == ["q1"]
    assert left_out(short)["questions about images that are left out"] == 1
    assert [e.id for e in loaders.gqa(write(folder, GRAPHS), folder, questions, limit=1)] == ["q1"]
    with pytest.raises(DataError, match="expected one JSON object with a record for each id, found a list"):
        loaders.gqa(graphs, folder, write(folder, list(document.values()), "questions.json"))


def test_bad_scene_graphs(folder: Path) -> None:
    for path, value, words in (
        (["1", "objects", "o1", "x"], "wide", "record '1', object 'o1': field 'x' must hold a number"),
        (["1", "objects", "o1", "relations"], 3, "object 'o1': field 'relations' must hold a list"),
        (["1", "objects", "o1", "relations"], [{"name": "on", "object": "o9"}], "relation 1: field 'object' is 'o9'"),
        (["1", "objects"], [], "record '1': field 'objects' must hold a JSON object with a value"),
        (["1", "objects", "o1", "attributes"], [""], "'attributes' must hold a list of texts"),
        (["2"], 5, "record '2': expected a JSON object"),
    ):
        graphs = json.loads(json.dumps(GRAPHS))
        place = graphs
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(DataError, match=words):
            loaders.gqa(write(folder, graphs), folder)


def genome(folder: Path) -> tuple[Path, Path, Path, Path]:
    """Write the first scene graph in Visual Genome's files."""
    objects = [
        {"object_id": 1, "x": 0, "y": 1, "w": 2, "h": 3, "names": ["apple", "fruit"], "synsets": []},
        {"object_id": 2, "x": 4, "y": 4, "w": 2, "h": 2, "name": "Cup"},
    ]
    return (
        write(folder, [{"image_id": 1, "objects": objects}, {"image_id": 2, "objects": objects[1:]}], "objects.json"),
        write(folder, [{"image_id": 1, "attributes": [{"object_id": 1, "attributes": ["Green", "round"]},
                                                      {"object_id": 2}]}], "attributes.json"),
        write(folder, [{"image_id": 1, "relationships": [
            {"relationship_id": 5, "predicate": "LEFT OF", "subject": {"object_id": 1}, "object": {"object_id": 2}},
            {"relationship_id": 6, "predicate": "", "subject": {"object_id": 1}, "object": {"object_id": 2}},
        ]}], "relationships.json"),
        write(folder, [{"id": 1, "regions": [{"region_id": 1, "phrase": "an apple"}, {"phrase": "a cup "}]},
                       {"id": 3, "regions": []}], "regions.json"),
    )  # fmt: skip


def test_visual_genome_by_hand(folder: Path) -> None:
    data = loaders.visual_genome(genome(folder)[0], folder, *genome(folder)[1:])
    answers = {e.question: e.answer for e in data if e.group == "1.jpg"}
    assert answers["Is the apple green?"] == "yes"
    assert answers["Is the apple to the left of the cup?"] == "yes"
    assert answers["Is the apple to the right of the cup?"] == "no"
    assert answers["Describe the image."] == "an apple; a cup"
    other = {e.question: e.answer for e in data if e.group == "2.jpg"}
    assert other == {"Is there a cup in the image?": "yes", "Is there an apple in the image?": "no"}
    assert left_out(data)["present objects without an absent object for a pair of questions"] == 2
    assert left_out(data)["relations without opposite"] == 1
    assert len(data.provenance["files"]) == 4
    (folder / "VG_100K").mkdir()
    (folder / "1.jpg").rename(folder / "VG_100K" / "1.jpg")
    moved = loaders.visual_genome(*genome(folder)[:1], folder, genome(folder)[1], limit=1)
    assert {e.group for e in moved} == {"VG_100K/1.jpg"}
    assert left_out(moved)["images beyond the limit"] == 1
    (folder / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"record 2: field 'image_id': image .*2\.jpg' does not exist"):
        loaders.visual_genome(genome(folder)[0], folder)


# ---- CLEVR -------------------------------------------------------------------------------------------------------------


def clevr_scene() -> dict[str, Any]:
    """Return three things: a red cube left of a blue sphere, and a second blue sphere behind both."""

    def thing(color: str, shape: str, size: str, x: float, y: float) -> dict[str, Any]:
        return {"color": color, "shape": shape, "size": size, "material": "metal", "pixel_coords": [x, y, 9.0],
                "3d_coords": [0, 0, 0]}  # fmt: skip

    return {
        "image_filename": "a.png",
        "objects": [thing("red", "cube", "small", 1, 2), thing("blue", "sphere", "small", 6, 2),
                    thing("blue", "sphere", "large", 4, 0)],
        "relationships": {"left": [[], [0, 2], [0]], "right": [[1, 2], [], [1]],
                          "behind": [[2], [2], []], "front": [[], [], [0, 1]]},
    }  # fmt: skip


def test_clevr_by_hand(folder: Path) -> None:
    data = loaders.clevr(write(folder, {"info": {}, "scenes": [clevr_scene()]}), folder, per_image=9)
    answers = {e.question: e.answer for e in data}
    assert {q for q, a in answers.items() if a == "yes" and "there" in q} == {
        "Is there a red cube in the image?", "Is there a blue sphere in the image?",
    }  # fmt: skip
    assert {q for q, a in answers.items() if a == "yes" and data.where(question=q)[0].level == "attribute"} == {
        "Is the small metal cube red?", "Is the small metal sphere blue?", "Is the large metal sphere blue?",
    }  # fmt: skip
    # Two blue spheres: "the blue sphere" is ambiguous, so no relation can be asked.
    assert not len(data.where(level="relation"))
    assert balanced(data)
    scene = clevr_scene()
    scene["objects"][2]["color"] = "gray"
    data = loaders.clevr(write(folder, {"scenes": [scene]}), folder, per_image=99)
    relations = {e.question for e in data if e.level == "relation" and e.answer == "yes"}
    # j in left[i] means that j is left of i: left[1] = [0, 2], behind[0] = [2].
    assert "Is the red cube left of the blue sphere?" in relations
    assert "Is the gray sphere behind the red cube?" in relations
    assert "Is the red cube in front of the gray sphere?" in relations
    assert len(relations) == 10
    assert balanced(data)
    (example,) = data.where(question="Is the red cube left of the blue sphere?")
    assert example.labels == {"relation:left of": True, "relation:right of": False, "relation:named": True}
    thing = example.named_object()
    assert thing is not None
    assert (thing.noun, thing.box) == ("cube", None)  # the file has centers, no outlines


def test_bad_clevr_scenes(folder: Path) -> None:
    for change, words in (
        ({"relationships": {}}, "scenes, record 1, relationships: no field 'left'"),
        (
            {"relationships": {**clevr_scene()["relationships"], "left": [[7], [], []]}},
            "'left' must hold, for each of 3",
        ),
        ({"image_filename": "none.png"}, "field 'image_filename': .*does not exist"),
        ({"objects": [{"color": "mauve"}]}, "objects 1: no field 'shape'|field 'color' is 'mauve'"),
    ):
        with pytest.raises(DataError, match=words):
            loaders.clevr(write(folder, {"scenes": [{**clevr_scene(), **change}]}), folder)
    scene = clevr_scene()
    scene["objects"][0]["color"] = "mauve"
    with pytest.raises(DataError, match="scenes, record 1, objects 1: field 'color' is 'mauve'; choose from gray"):
        loaders.clevr(write(folder, {"scenes": [scene]}), folder)
