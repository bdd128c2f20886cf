"""Questions about attributes and actions: a "no" only where the annotation excludes it. VAW, LVIS and outlines by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concepts import counterfactuals, loaders, scenes
from concepts.counterfactuals.photographs.color_names import color_name
from concepts.counterfactuals.photographs.inpaint import InpaintedImage, filled_mask
from concepts.counterfactuals.photographs.mirror import mirror_objects
from concepts.counterfactuals.photographs.recolor import RecoloredImage
from concepts.counterfactuals.photographs.regions import region_mask
from concepts.counterfactuals.photographs.swap import pair_kind
from concepts.reading.exclusive_values import ACTION_SETS, ACTIONS, ANTONYMS, EXCLUSIVE, alternatives, attribute_kinds
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError
from groundscope.testing.annotation_files import write_annotations
from groundscope.testing.composite_photographs import GRAY, save_composites


def images(folder: Path, *names: str, size: tuple[int, int] = (60, 40)) -> None:
    for name in names:
        Image.new("RGB", size, "gray").save(folder / name)


def thing(name: str, x: int, *attributes: str, **relations: str) -> dict[str, Any]:
    named = [{"name": verb.replace("_", " "), "object": other} for verb, other in relations.items()]
    return {"name": name, "x": x, "y": 4, "w": 10, "h": 12, "attributes": list(attributes), "relations": named}


def gqa(folder: Path, graphs: Mapping[str, dict[str, Any]], **options: Any) -> ConceptDataset:
    images(folder, *(f"{number}.jpg" for number in graphs))
    file = folder / "graphs.json"
    file.write_text(json.dumps({n: {"width": 60, "height": 40, "objects": objects} for n, objects in graphs.items()}))
    return loaders.gqa(file, folder, **options)


def answers(data: ConceptDataset, kind: str) -> dict[str, str]:
    return {e.question: e.answer for e in data if e.kind == kind}


def test_a_no_is_the_opposite_or_another_value_of_an_exclusive_set(tmp_path: Path) -> None:
    objects = {
        "1": thing("door", 0, "open", "wood"), "2": thing("plates", 20, "large", "two", "round", "square"),
        "3": thing("man", 40, "old", "happy", "short"),
    }  # fmt: skip
    data = gqa(tmp_path, {"7": objects}, per_image=10)
    assert answers(data, "state") == {"Is the door open?": "yes", "Is the door closed?": "no"}
    assert answers(data, "size") == {"Are the plates big?": "yes", "Are the plates small?": "no"}
    assert answers(data, "age") == {"Is the man old?": "yes", "Is the man young?": "no"}
    material, count = answers(data, "material"), answers(data, "count")
    assert material.pop("Is the door wooden?") == "yes"
    [(text, answer)] = material.items()
    assert (answer, text[len("Is the door ") : -1]) in {("no", value) for value in EXCLUSIVE["material"]}
    assert count.pop("Are there two plates in the image?") == "yes"
    assert list(count.values()) == ["no"]
    # Two values of an exclusive set, and words without an opposite or with two, make no question.
    assert not {e.kind for e in data} & {"shape", "height", "length", "attribute"}
    door = next(e for e in data if e.question == "Is the door closed?")
    assert door.labels == {"attribute:open": True, "attribute:closed": False, "attribute:named": False}
    assert (door.level, pair_kind(door)) == ("attribute", "attribute")
    assert door.objects[0].attributes == {"open": "open", "wood": "wood", "material": "wooden", "state": "open"}


def test_tables_of_attributes_and_actions_are_consistent() -> None:
    values = [v for options in EXCLUSIVE.values() for v in options]
    assert len(values) == len(set(values))
    for kind in (*EXCLUSIVE, *ANTONYMS):
        for value in EXCLUSIVE.get(kind) or {v for pair in ANTONYMS[kind] for v in pair} - {"short"}:
            others = alternatives(kind, value, "thing")
            assert others
            assert value not in others
            assert attribute_kinds([value], "thing")[kind] == value
            assert kind not in attribute_kinds([value, others[0]], "thing")
    assert all(verb in ACTIONS[other] for group in ACTION_SETS for verb in group for other in group if other != verb)


def test_actions_ask_for_subject_verb_and_object(tmp_path: Path) -> None:
    graphs = {
        "1": {
            "1": thing("man", 0, riding="2", near="2"), "2": thing("horse", 20),
            "3": thing("dog", 40, wearing="2", holding="2"),
        },
        "2": {"1": thing("man", 0, pushing="2"), "2": thing("horse", 20)},
    }  # fmt: skip
    data = gqa(tmp_path, graphs, per_image=5)
    actions = [(e.group, e.question, e.answer) for e in data if e.kind == "action"]
    assert ("1.jpg", "Is the man riding the horse?", "yes") in actions
    assert ("2.jpg", "Is the man pushing the horse?", "yes") in actions
    assert {a for _, _, a in actions} == {"yes", "no"}
    assert not [q for _, q, _ in actions if "dog" in q]  # two actions of one set contradict each other
    assert data.provenance["left_out"]["actions that contradict another"] == 2  # pyright: ignore[reportIndexIssue]
    assert {e.level for e in data if e.kind == "action"} == {"relation"}


def test_actions_and_attributes_are_exchanged_between_photographs(tmp_path: Path) -> None:
    graphs = {}
    for number in range(12):
        action, material = ("riding", "pushing", "carrying")[number % 3], ("wooden", "metal")[number % 2]
        graphs[str(number)] = {"1": thing("man", 0, **{action: "2"}), "2": thing("bench", 20, material)}
    data = gqa(tmp_path, graphs)
    for kind, word in (("action", 2), ("attribute", -1)):
        for placebo in (False, True):
            pairs = counterfactuals.pairs(data, kind, method="swap", placebo=placebo)
            for pair in pairs:
                number = int(Path(pair.change.split(" -> ")[1]).stem)
                truth = {
                    "action": ("riding", "pushing", "carrying")[number % 3],
                    "attribute": ("wooden", "metal")[number % 2],
                }
                named = pair.clean.question.rstrip("?").split()[3 if word == 2 else -1]
                assert pair.corrupt.answer == ("yes" if named == truth[kind] else "no")
                assert (pair.corrupt.answer == pair.clean.answer) is placebo
                assert (pair.kind, pair.clean.question) == (kind, pair.corrupt.question)


def record(**values: Any) -> dict[str, Any]:
    plain = {
        "image_id": "5", "instance_id": "50", "instance_bbox": [4, 6, 20, 10], "object_name": "Car",
        "instance_polygon": [[[4, 6], [24, 6], [24, 16], [4, 16]]], "positive_attributes": ["red", "parked"],
        "negative_attributes": ["wet", "grey", "red"],
    }  # fmt: skip
    return {**plain, **values}


def vaw(folder: Path, *records: dict[str, Any], **options: Any) -> ConceptDataset:
    images(folder, "5.jpg", "6.jpg")
    (folder / "vaw.json").write_text(json.dumps(records))
    return loaders.vaw(folder / "vaw.json", folder, **options)


def test_vaw_asks_what_annotators_confirmed_or_denied(tmp_path: Path) -> None:
    data = vaw(
        tmp_path, record(), record(image_id=6, instance_id="60", object_name="dogs"),
        record(image_id=6, instance_id="61", object_name="dog"), limit=2,
    )  # fmt: skip
    assert [(e.question, e.answer, e.kind) for e in data] == [
        ("Is the car parked?", "yes", "attribute"), ("Is the car wet?", "no", "state"), ("Is the car gray?", "no", "color"),
    ]  # fmt: skip
    assert data[0].labels["attribute:parked"] is True
    assert data.provenance["left_out"] == {  # pyright: ignore[reportIndexIssue]
        "instances of images beyond the limit": 0, "attributes that are both true and false": 3,
        "objects whose noun is not unique": 2,
    }  # fmt: skip
    car = data[0].objects[0]
    assert car.outline == ((4.0, 6.0, 24.0, 6.0, 24.0, 16.0, 4.0, 16.0),)
    assert data[0].record()["objects"][0]["outline"] == [list(car.outline[0])]  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"instance_bbox": [1, 2, 3]}, "'instance_bbox' must hold x, y, width, height, not 3 values"),
        (
            {"instance_polygon": [[[1, "a"]]]},
            "'instance_polygon' must hold polygons, lists of x and y in pixels, a mask of run lengths, or null",
        ),
        ({"instance_polygon": "none"}, "'instance_polygon' must hold polygons"),
        ({"positive_attributes": "red"}, "'positive_attributes' must hold a list"),
        ({"image_id": 9}, "9.jpg"),
        ({"object_name": ""}, "'object_name' must hold text"),
    ],
)
def test_wrong_records_of_vaw_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        vaw(tmp_path, record(), record(**{"instance_id": "51", **values}))
    assert "\n" not in str(error.value)


def test_in_the_layout_of_lvis_only_stated_categories_are_absent(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg")
    document = {
        "images": [{"id": 1, "coco_url": "http://x/val2017/a.jpg", "width": 60, "height": 40, "neg_category_ids": [3]}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("dog", "cat", "bus", "kite"))],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 5, 5]}],
    }
    (tmp_path / "lvis.json").write_text(json.dumps(document))
    data = loaders.coco(tmp_path / "lvis.json", tmp_path)
    assert {e.question: e.answer for e in data} == {
        "Is there a dog in the image?": "yes", "Is there a kite in the image?": "no",
    }  # fmt: skip
    assert set(data[1].labels) == {"object:kite", "object:named"}


def test_outlines_of_coco_limit_what_an_edit_changes(tmp_path: Path) -> None:
    pixels = np.full((40, 60, 3), 150, np.uint8)
    triangle = [10.0, 10.0, 30.0, 10.0, 10.0, 30.0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 120, "height": 80}],
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 0, "bbox": [20, 20, 40, 40], "segmentation": [[2 * x for x in triangle]]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [80, 0, 9, 9]},
        ],
    }  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(document))
    plain, data = (loaders.coco(tmp_path / "coco.json", tmp_path, outlines=on)[0] for on in (False, True))
    assert plain.objects[0].outline == ()
    dog, cat = data.objects
    assert (dog.outline, cat.outline) == ((tuple(triangle),), ())  # scaled with the boxes
    inside = region_mask((60, 40), dog.require_box(), dog.outline)
    rows, columns = np.mgrid[:40, :60]
    by_hand = (columns >= 10) & (rows >= 10) & (columns + rows <= 40)
    assert (inside == by_hand).mean() > 0.98
    image = data.image
    edited = np.asarray(InpaintedImage(image, dog.require_box(), dog.outline).load())
    mask = filled_mask((60, 40), dog.require_box(), dog.outline)
    assert (edited[~mask] == pixels[~mask]).all()
    assert mask.sum() < filled_mask((60, 40), dog.require_box()).sum()
    red = RecoloredImage(image, dog.require_box(), "red", "blue", dog.outline)
    assert not red.mask()[~inside].any()


def test_outlines_move_with_mirrors_and_canvases(tmp_path: Path) -> None:
    data = vaw(tmp_path, record())
    moved = counterfactuals.on_canvas(data, (120, 120))[0].objects[0]
    assert moved.outline == ((8.0, 32.0, 48.0, 32.0, 48.0, 52.0, 8.0, 52.0),)
    mirrored = mirror_objects(data[0].objects, 60)[0]
    assert mirrored.outline == ((56.0, 6.0, 36.0, 6.0, 36.0, 16.0, 56.0, 16.0),)
    assert region_mask((60, 40), mirrored.require_box(), mirrored.outline).any()


def test_icons_on_photographs_have_true_boxes_and_outlines(tmp_path: Path) -> None:
    icon_scenes = scenes.dataset(10, seed=4)
    data = save_composites(icon_scenes, tmp_path, gray_share=1.0)
    first = {e.image.identity: e for e in data}
    assert len({e.image.load().size for e in first.values()}) > 1
    for example, scene in list({e.group: (e, d) for e, d in zip(data, icon_scenes, strict=True)}.values())[:3]:
        image = example.image.load()
        # On a gray background every other pixel belongs to an icon.
        icons = np.abs(np.asarray(image, float) - GRAY).max(axis=2) > 40
        outlines, boxes = np.zeros_like(icons), np.zeros_like(icons)
        for item in example.objects:
            outlines |= region_mask(image.size, item.require_box(), item.outline)
            boxes |= region_mask(image.size, item.require_box())
        assert not (icons & ~boxes).any()
        assert (icons & outlines).sum() > 0.93 * icons.sum()  # edges are soft
        assert (icons & outlines).sum() > 0.8 * outlines.sum()  # the rest is light inside an icon
        assert [o.noun for o in example.objects] == [o.noun for o in scene.objects]
    with pytest.raises(ConfigError, match=r"gray_share=2 must be from 0 to 1"):
        save_composites(icon_scenes, tmp_path, gray_share=2)


def test_recoloring_inside_an_outline_leaves_the_photograph_alone(tmp_path: Path) -> None:
    composites = save_composites(scenes.dataset(16, seed=4), tmp_path / "images", gray_share=0.5)
    data = write_annotations(composites, tmp_path, "vaw").load()
    pairs = counterfactuals.balanced_pairs(data, "color", method="recolor", limit=4)
    for pair in pairs:
        clean, corrupt = (np.asarray(e.image.load()) for e in (pair.clean, pair.corrupt))
        subject = pair.clean.named_object()
        assert subject is not None
        inside = region_mask(pair.clean.image.load().size, subject.require_box(), subject.outline)
        assert (clean == corrupt)[~inside].all()
        assert (clean != corrupt).any(axis=2)[inside].mean() > 0.3
        median = tuple(float(v) for v in np.median(corrupt[(clean != corrupt).any(axis=2)], axis=0))
        assert color_name((median[0], median[1], median[2])) == pair.change.rsplit(" ", 1)[-1]
