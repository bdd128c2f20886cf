"""Masks as run lengths: against pycocotools, a naive decoder and masks drawn by hand, and in every edit that uses an outline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from concepts import RunLengthMask, counterfactuals, loaders, scenes
from concepts.annotated_object import AnnotatedObject, Box
from concepts.counterfactuals.photographs.inpaint import InpaintedImage, filled_mask
from concepts.counterfactuals.photographs.mirror import mirror_objects
from concepts.counterfactuals.photographs.recolor import RecoloredImage
from concepts.counterfactuals.photographs.regions import region_mask
from concepts.outlines import outline_from_record, outline_record
from experiments.records import EXAMPLE, problem
from groundscope.core.errors import DataError
from groundscope.testing.annotation_files import write_annotations
from groundscope.testing.composite_photographs import GRAY, save_composites

SCATTERED = np.array([[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]], bool)
RECTANGLE = np.zeros((5, 7), bool)
RECTANGLE[1:4, 2:6] = True
ELLIPSE = ((np.mgrid[:480, :640][0] - 200) / 30) ** 2 + ((np.mgrid[:480, :640][1] - 400) / 9) ** 2 < 1
PYCOCOTOOLS = {
    ";32000004": RECTANGLE, "522OO12ON0020": SCATTERED, "kmg5k0P>:G8J4L4L4M2O00000001N3L4L4L6H9FZS\\3": ELLIPSE,
    "06": np.ones((3, 2), bool), "6": np.zeros((3, 2), bool),
}  # fmt: skip
"""Compressed counts that pycocotools 2.0.11 wrote, and their masks."""


def naive_pixels(width: int, height: int, text: str) -> np.ndarray:
    """Decode the compressed form with texts of bits: one number a group of characters, two's complement."""
    groups, group = [], ""
    for character in text:
        bits = f"{ord(character) - 48:06b}"
        group = bits[1:] + group
        if bits[0] == "0":
            groups.append(int(group, 2) - (2 ** len(group) if group[0] == "1" else 0))
            group = ""
    runs: list[int] = []
    for i, number in enumerate(groups):
        runs.append(number if i < 3 else number + runs[i - 2])
    flat = [i % 2 == 1 for i, run in enumerate(runs) for _ in range(run)]
    return np.array([[flat[x * height + y] for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("text", PYCOCOTOOLS)
def test_texts_of_pycocotools_are_read_and_written(text: str) -> None:
    pixels = PYCOCOTOOLS[text]
    mask = RunLengthMask(pixels.shape[1], pixels.shape[0], text)
    assert (mask.pixels() == pixels).all()
    assert (naive_pixels(*mask.size, text) == pixels).all()
    assert RunLengthMask.from_pixels(pixels).counts == text
    assert bool(mask) is bool(pixels.any())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_random_masks_survive_the_compressed_form(width: int, height: int, share: float, seed: int) -> None:
    pixels = np.random.default_rng(seed).random((height, width)) < share
    mask = RunLengthMask.from_pixels(pixels)
    assert (mask.pixels() == pixels).all()
    assert (naive_pixels(width, height, mask.counts) == pixels).all()


def test_masks_are_mirrored_scaled_and_moved() -> None:
    mask = RunLengthMask.from_pixels(SCATTERED)
    assert (mask.mirrored().pixels() == np.fliplr(SCATTERED)).all()
    double = mask.placed((2.0, 3.0), (0.0, 0.0), (8, 18)).pixels()
    assert (double == np.kron(SCATTERED, np.ones((3, 2))).astype(bool)).all()
    moved = mask.placed((1.0, 1.0), (2.0, -1.0), (5, 6)).pixels()
    by_hand = np.zeros((6, 5), bool)
    by_hand[:5, 2:] = SCATTERED[1:, :3]
    assert (moved == by_hand).all()
    assert (mask.placed((0.5, 0.5), (0.0, 0.0), (2, 3)).pixels() == SCATTERED[1::2, 1::2]).all()


@pytest.mark.parametrize(
    ("width", "height", "counts", "message"),
    [
        (3, 2, "123 ", "have the character ' ' at position 3"),
        (3, 2, "12", "sum to 3 with the shortest 1; they must not be negative and sum to the 3 x 2 = 6 pixels"),
        (3, 2, "9M", "sum to 6 with the shortest -3"),
        (3, 2, "12S", "end inside a length"),
        (3, 2, "1" + "o" * 9, "more digits than a length has at position 8"),
        (0, 2, "0", "the width of a mask is 0; it must be a whole number from 1 to 65536"),
        (3, 2.5, "6", "the height of a mask is 2.5"),
    ],
)
def test_wrong_masks_are_refused(width: Any, height: Any, counts: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        RunLengthMask(width, height, counts)
    with pytest.raises(DataError, match=r"it must be \[height, width\]"):
        RunLengthMask.from_pixels(np.zeros(3))
    with pytest.raises(DataError, match="a mask of 4 x 6 pixels does not fit an image of 6 x 4"):
        region_mask((6, 4), Box(0, 0, 1, 1), RunLengthMask.from_pixels(SCATTERED))


DOG = np.zeros((80, 120), bool)
DOG[20:60:2, 20:60] = True
CROWD = np.zeros((80, 120), bool)
CROWD[5:15, 80:110] = CROWD[60:70, 90:100] = True


def runs(pixels: np.ndarray) -> list[int]:
    """Return the uncompressed form by counting pixels one by one."""
    result, inside = [0], False
    for value in pixels.T.ravel().tolist():
        if value != inside:
            result.append(0)
            inside = value
        result[-1] += 1
    return result


def coco_document(**changes: Any) -> dict[str, Any]:
    crowd = {"size": [80, 120], "counts": runs(CROWD), **changes}
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 120, "height": 80}],
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 2, "name": "bus"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 0, "bbox": [20, 20, 40, 40],
             "segmentation": {"size": [80, 120], "counts": RunLengthMask.from_pixels(DOG).counts}},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [80, 5, 30, 65], "iscrowd": 1, "segmentation": crowd},
        ],
    }  # fmt: skip


def load(folder: Path, document: dict[str, Any], size: tuple[int, int] = (120, 80)) -> Any:
    image = Image.new("RGB", size, (150, 150, 150))
    image.paste((200, 30, 30), (0, 0, size[0], size[1] // 2))
    image.save(folder / "a.png")
    (folder / "coco.json").write_text(json.dumps(document))
    return loaders.coco(folder / "coco.json", folder, outlines=True)


def test_masks_of_coco_and_of_crowds_limit_what_an_edit_changes(tmp_path: Path) -> None:
    data = load(tmp_path, coco_document())
    dog, crowd = data[0].objects
    assert (region_mask((120, 80), dog.box, dog.outline) == DOG).all()
    assert (region_mask((120, 80), crowd.box, crowd.outline) == CROWD).all()
    before = np.asarray(data[0].image.load())
    red = RecoloredImage(data[0].image, dog.box, "red", "blue", dog.outline)
    upper = np.arange(80)[:, None] < 40
    assert (red.mask() == (DOG & upper)).all()
    after = np.asarray(red.load())
    assert ((after != before).any(axis=2) == (DOG & upper)).all()
    filled = InpaintedImage(data[0].image, crowd.box, crowd.outline)
    mask = filled_mask((120, 80), crowd.box, crowd.outline)
    assert mask.sum() < filled_mask((120, 80), crowd.box).sum()
    assert (np.asarray(filled.load()) == before)[~mask].all()
    assert red.identity != replace(red, outline=()).identity
    assert json.loads(red.identity)[4] == outline_record(dog.outline)


def test_masks_follow_their_image(tmp_path: Path) -> None:
    objects = load(tmp_path, coco_document(), size=(240, 160))[0].objects  # the image was enlarged after annotation
    assert (objects[0].outline.pixels() == np.kron(DOG, np.ones((2, 2))).astype(bool)).all()
    data = load(tmp_path, coco_document())
    moved = counterfactuals.on_canvas(data, (240, 200))[0].objects[0]
    by_hand = np.zeros((200, 240), bool)
    by_hand[20:180] = np.kron(DOG, np.ones((2, 2)))
    assert (moved.outline.pixels() == by_hand).all()
    assert (mirror_objects(data[0].objects, 120)[0].outline.pixels() == DOG[:, ::-1]).all()


def test_masks_without_pixels_are_no_outlines(tmp_path: Path) -> None:
    data = load(tmp_path, coco_document(counts=[80 * 120]))
    assert data[0].objects[1].outline == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [1, 2]}, "annotations, record 2: field 'segmentation': the run lengths of a mask sum to 3"),
        ({"counts": [1.5]}, "'segmentation' must hold polygons, or a mask with 'size'"),
        ({"counts": None}, "'segmentation' must hold polygons, or a mask with 'size'"),
        ({"size": [80]}, "'segmentation' must hold polygons, or a mask with 'size'"),
        ({"size": [120, 80]}, "annotation 2: its mask has 80 x 120 pixels, its image 120 x 80; a mask must have the width"),
        ({"size": [80, "120"]}, "'segmentation': the width of a mask is 120"),
        ({"counts": "zz"}, "'segmentation': the counts of a mask have the character 'z'"),
    ],
)  # fmt: skip
def test_wrong_masks_of_a_file_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, coco_document(**changes))
    assert "\n" not in str(error.value)


def test_a_record_keeps_either_kind_of_outline() -> None:
    for outline in (RunLengthMask.from_pixels(SCATTERED), ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0),), ()):
        record = json.loads(json.dumps(outline_record(outline)))
        assert outline_from_record(record) == outline
    item = AnnotatedObject("1", "dog", None, outline=RunLengthMask.from_pixels(SCATTERED))
    shape = EXAMPLE["objects"]
    assert problem([item.record()], shape) is None
    wrong = {**item.record(), "outline": {"size": [6, 4]}}
    assert problem([wrong], shape) == "[0].outline has no field 'counts'; it was damaged or written by another release"


def test_composites_have_masks_that_edits_use(tmp_path: Path) -> None:
    icon_scenes = scenes.dataset(16, seed=4)
    data = save_composites(icon_scenes, tmp_path / "gray", gray_share=1.0, masks=True)
    image = data[0].image.load()
    icons = np.abs(np.asarray(image, float) - GRAY).max(axis=2) > 40
    masks = np.zeros_like(icons)
    for item in data[0].objects:
        masks |= region_mask(image.size, item.require_box(), item.outline)
    assert (icons & masks).sum() > 0.93 * icons.sum()  # edges are soft
    composites = save_composites(icon_scenes, tmp_path / "images", masks=True)
    files = write_annotations(composites, tmp_path, "coco")
    annotated = loaders.coco(files.file, files.images, outlines=True)
    by_group = {e.group: e for e in annotated}
    for example in composites:
        loaded = by_group[example.image.name]
        assert [o.outline for o in loaded.objects] == [o.outline for o in example.objects]
    pairs = counterfactuals.pairs(composites, "color", method="recolor", limit=4)
    for pair in pairs:
        subject = pair.clean.named_object()
        assert subject is not None
        clean, corrupt = (np.asarray(e.image.load()) for e in (pair.clean, pair.corrupt))
        changed = (clean != corrupt).any(axis=2)
        assert not changed[~subject.outline.pixels()].any()
        assert changed[subject.outline.pixels()].mean() > 0.3
