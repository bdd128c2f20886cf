"""Boxes of annotations, on images that were turned by EXIF or resized, and boxes that cannot be right."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concepts import ConceptDataset, counterfactuals, loaders
from concepts.annotated_object import AnnotatedObject, Box
from concepts.image_files import FileImage
from concepts.reading.box_frames import EMPTY, OUTSIDE, UNKNOWN_FRAME, BoxFrame
from concepts.schema import Example
from groundscope.core.errors import DataError

WIDE, HIGH = 120, 60
RED = (80, 6, 30, 20)
"""x, y, width and height of a red rectangle on white, of which the annotations have the box."""


def picture(path: Path, *, orientation: int = 1, size: tuple[int, int] = (WIDE, HIGH), upright: bool = False) -> None:
    """Write the rectangle; `upright`: where it is after the orientation is applied, not before."""
    pixels = np.full((HIGH, WIDE, 3), 255, np.uint8)
    x, y, width, height = RED
    pixels[y : y + height, x : x + width] = (255, 0, 0)
    image = Image.fromarray(pixels)
    if upright:  # store what the orientation turns into the rectangle
        undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that is the inverse
        image = image.transpose(Image.Transpose(undo[orientation]))
        size = image.size
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.resize(size, Image.Resampling.NEAREST).save(path, quality=100, subsampling=0, exif=exif)


def coco(folder: Path, boxes: list[list[float]], size: tuple[int, int] | None = (WIDE, HIGH)) -> ConceptDataset:
    """Load an image and a blank one, of which the annotations have some boxes and a width and height."""
    Image.new("RGB", (WIDE, HIGH), "white").save(folder / "b.jpg")
    sizes = {} if size is None else {"width": size[0], "height": size[1]}
    annotations = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes, 1)]
    annotations.append({"id": 99, "image_id": 2, "category_id": 2, "bbox": [1, 1, 5, 5]})
    images = [{"id": 1, "file_name": "a.jpg", **sizes}, {"id": 2, "file_name": "b.jpg"}]
    categories = [{"id": 1, "name": "ball"}, {"id": 2, "name": "cup"}]
    (folder / "i.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories}), encoding="utf-8"
    )
    return loaders.coco(folder / "i.json", folder)


def red_share(example: Example) -> tuple[float, float]:
    """Return the share of the box that is red, and the share of what is red that is in the box."""
    box = example.objects[0].require_box()
    pixels = np.asarray(example.image.load()).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 90)
    inside = red[math.floor(box.y0) : math.ceil(box.y1), math.floor(box.x0) : math.ceil(box.x1)]
    return float(inside.sum() / box.area), float(inside.sum() / red.sum())


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_boxes_of_stored_pixels_turn_and_scale_with_the_image(tmp_path: Path, orientation: int, scale: float) -> None:
    picture(tmp_path / "a.jpg", orientation=orientation, size=(int(WIDE * scale), int(HIGH * scale)))
    example = coco(tmp_path, [list(RED)])[0]
    box = example.objects[0].require_box()
    assert sorted((box.x1 - box.x0, box.y1 - box.y0)) == [20 * scale, 30 * scale]
    assert min(red_share(example)) > 0.9


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_upright_image_stay(tmp_path: Path, orientation: int) -> None:
    picture(tmp_path / "a.jpg", orientation=orientation, upright=True)
    example = coco(tmp_path, [list(RED)])[0]
    assert example.objects[0].box == Box(80, 6, 110, 26)
    assert min(red_share(example)) > 0.9


@pytest.mark.parametrize("orientation", [2, 3, 4])
@pytest.mark.parametrize("size", [(WIDE, HIGH), None])
def test_a_frame_that_the_size_does_not_decide_gives_no_boxes(
    tmp_path: Path, orientation: int, size: tuple[int, int] | None
) -> None:
    picture(tmp_path / "a.jpg", orientation=orientation)
    data = coco(tmp_path, [list(RED)], size)
    assert data[0].objects[0].box is None
    assert (data[0].answer, data[0].objects[0].noun) == ("yes", "ball")
    assert data.provenance["left_out"][UNKNOWN_FRAME] == 1  # type: ignore[index]


def test_an_orientation_without_an_annotated_size_gives_no_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", orientation=6)
    assert coco(tmp_path, [list(RED)], None)[0].objects[0].box is None
    picture(tmp_path / "a.jpg")
    assert coco(tmp_path, [list(RED)], None)[0].objects[0].box == Box(80, 6, 110, 26)


def test_another_shape_is_refused_with_both_sizes(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", size=(100, 60))
    words = r"record 1: field 'file_name': image '.*a\.jpg' has 100 x 60 pixels, but .* with 120 x 60 pixels"
    with pytest.raises(DataError, match=words):
        coco(tmp_path, [list(RED)])
    picture(tmp_path / "a.jpg", orientation=8, size=(100, 60))
    with pytest.raises(
        DataError, match=r"has 60 x 100 pixels \(100 x 60 before its EXIF orientation\), but its annotation is of"
    ):
        coco(tmp_path, [list(RED)])
    for sizes in ({"width": 120}, {"width": 0, "height": 60}, {"width": 1.5, "height": 60}):
        file = tmp_path / "i.json"
        entries = json.loads(file.read_text(encoding="utf-8"))
        entries["images"] = [{"id": n, "file_name": "b.jpg", **sizes} for n in (1, 2)]
        file.write_text(json.dumps(entries), encoding="utf-8")
        with pytest.raises(DataError, match=r"record 1: (no field 'height'|field 'width' must hold a positive whole)"):
            loaders.coco(file, tmp_path)


@pytest.mark.parametrize(("small", "large"), [((500, 333), (1024, 683)), ((333, 500), (683, 1024)), ((8, 8), (8, 8))])
def test_resizing_is_known_to_a_pixel_of_the_smaller_size(
    tmp_path: Path, small: tuple[int, int], large: tuple[int, int]
) -> None:
    for size, annotated in ((small, large), (large, small)):
        picture(tmp_path / "a.jpg", size=size)
        assert coco(tmp_path, [[0, 0, *annotated]], annotated)[0].objects[0].box == Box(0, 0, *size)


def test_gqa_and_visual_genome_scale_boxes_in_the_same_way(tmp_path: Path) -> None:
    picture(tmp_path / "1.jpg", orientation=6, size=(WIDE // 2, HIGH // 2))
    Image.new("RGB", (9, 9)).save(tmp_path / "2.jpg")
    place = dict(zip("xywh", RED, strict=True))
    graphs = {
        "1": {"width": WIDE, "height": HIGH, "objects": {"o": {"name": "ball", **place}}},
        "2": {"objects": {"p": {"name": "cup", "x": 0, "y": 0, "w": 9, "h": 9}}},
    }
    (tmp_path / "g.json").write_text(json.dumps(graphs), encoding="utf-8")
    objects = [
        {"image_id": int(key), "objects": [{"object_id": 1, **thing} for thing in graph["objects"].values()]}
        for key, graph in graphs.items()
    ]
    (tmp_path / "o.json").write_text(json.dumps(objects), encoding="utf-8")
    sizes = [{"image_id": 1, "width": WIDE, "height": HIGH}, {"image_id": 2, "width": 9, "height": 9}]
    (tmp_path / "s.json").write_text(json.dumps(sizes), encoding="utf-8")
    for data in (
        loaders.gqa(tmp_path / "g.json", tmp_path),
        loaders.visual_genome(tmp_path / "o.json", tmp_path, image_data=tmp_path / "s.json"),
    ):
        assert data[0].objects[0].box == Box(17, 40, 27, 55)
        assert min(red_share(data[0])) > 0.9
    without = loaders.visual_genome(tmp_path / "o.json", tmp_path)
    assert without[0].objects[0].box is None
    assert without.provenance["left_out"][UNKNOWN_FRAME] == 1  # type: ignore[index]
    sizes[0]["width"] = 90
    (tmp_path / "s.json").write_text(json.dumps(sizes), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"record 1: field 'image_id': image '.*1\.jpg' has 30 x 60 pixels .* with 90 x 60"
    ):
        loaders.visual_genome(tmp_path / "o.json", tmp_path, image_data=tmp_path / "s.json")


def test_aro_leaves_out_crops_of_images_with_an_orientation(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "t.jpg", orientation=6)
    record = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 9, "bbox_h": 9, "relation_name": "on", "true_caption": "a on b",
              "false_caption": "b on a"}  # fmt: skip
    (tmp_path / "r.json").write_text(
        json.dumps([{**record, "image_path": name} for name in ("a.jpg", "t.jpg")]), encoding="utf-8"
    )
    data = loaders.aro(tmp_path / "r.json", tmp_path)
    assert {e.group for e in data} == {"a.jpg"}
    assert sum(dict(data.provenance["left_out"]).values()) == 1  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([80, 6, 30, 20], Box(80, 6, 110, 26)),
        ([-1, -0.5, 30, 20], Box(0, 0, 29, 19.5)),
        ([91, 41, 30, 20], Box(91, 41, 120, 60)),
        ([90.005, 6, 30, 20], Box(90.005, 6, 120.005, 26)),  # rounded to hundredths
        ([92, 6, 30, 20], OUTSIDE),
        ([-2, 6, 30, 20], OUTSIDE),
        ([80, 42, 30, 20], OUTSIDE),
        ([120.5, 6, 0.4, 20], OUTSIDE),
        ([300, 6, 30, 20], OUTSIDE),
        ([80, 6, 0, 20], EMPTY),
    ],
)
def test_a_box_is_inside_the_image_or_left_out(tmp_path: Path, box: list[float], expected: Box | str) -> None:
    picture(tmp_path / "a.jpg")
    data = coco(tmp_path, [box, list(RED)])
    first, second = data[0].objects
    reasons = {r: n for r, n in data.provenance["left_out"].items() if r in {EMPTY, OUTSIDE, UNKNOWN_FRAME}}  # type: ignore[attr-defined]
    if isinstance(expected, Box):
        assert (first.box, reasons) == (expected, {})
    else:
        assert (first.box, reasons) == (None, {expected: 1})
    assert second.box == Box(80, 6, 110, 26)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (
            [80, 6, -30, 20],
            r"annotations, record 1: field 'w' is -30; the width and height of a box must not be negative",
        ),
        ([80, 6, 30, -1], r"annotations, record 1: field 'h' is -1"),
        ([1e308, 6, 1e308, 20], r"annotations, record 1: the box .* ends at infinity"),
    ],
)
def test_a_box_that_is_no_box_is_refused(tmp_path: Path, box: list[float], words: str) -> None:
    picture(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=words):
        coco(tmp_path, [box])


@pytest.mark.parametrize("sides", [(0, 0, math.inf, 1), (-1, 0, 1, 1), (math.nan, 0, 1, 1), (2, 0, 2, 1), (3, 0, 2, 1)])
def test_an_object_has_a_box_of_finite_positive_area(sides: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"object 'o' has the box .* give None for an object without a box"):
        AnnotatedObject("o", "ball", Box(*sides))
    thing = AnnotatedObject("o", "ball", None)
    with pytest.raises(DataError, match=r"object 'o' \(ball\) has no box"):
        thing.require_box()


def test_a_frame_counts_nothing_for_a_good_box() -> None:
    left_out: Counter[str] = Counter()
    assert BoxFrame((10, 10)).place(1, 1, 2, 2, left_out) == Box(1, 1, 3, 3)
    assert not left_out


def test_an_object_without_a_box_has_no_place(tmp_path: Path) -> None:
    Image.new("RGB", (112, 112)).save(tmp_path / "a.png")
    things = (AnnotatedObject("p", "cup", Box(0, 0, 56, 56)), AnnotatedObject("o", "ball", None))
    image = FileImage(tmp_path / "a.png", "a.png")
    example = Example("e", image, "Is there a ball in the image?", "yes", ("yes", "no"), "object", "existence", "random",
                      "a.png", objects=things, subject="o")  # fmt: skip
    assert not list(counterfactuals.KINDS["mask"](ConceptDataset("one", (example,))))
    assert json.loads(json.dumps(example.record()))["objects"][1]["box"] is None
    assert ConceptDataset("d", (example,)).digest


def bitmap(width: int, height: int) -> bytes:
    """Return the bytes of a BMP file of one color."""
    line = bytes([10, 20, 30] * width)
    data = (line + bytes(-len(line) % 4)) * height
    start = b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54)
    return start + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(data), 2835, 2835, 0, 0) + data


def test_data_whose_boxes_were_right_keep_their_digest(tmp_path: Path) -> None:
    """The digests of the code before sizes and orientations were read: splits and stores refer to them."""
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(bitmap(8, 6))
    boxes = [(1, 1, [1.5, 2, 3.25, 4]), (2, 2, [0, 0, 8, 6]), (1, 3, [4.005, 0.01, 4, 6])]
    instances = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 8, "height": 6} for n in (1, 2)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box}
            for n, (image, category, box) in enumerate(boxes, 1)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(("ball", "cup", "dog"), 1)],
    }
    first = {
        "a": {"name": "ball", "x": 1, "y": 2, "w": 3, "h": 4},
        "b": {"name": "cup", "x": 0, "y": 0, "w": 8, "h": 6},
    }
    second = {"c": {"name": "dog", "x": 1, "y": 1, "w": 2, "h": 2}}
    graphs = {"1": {"width": 8, "height": 6, "objects": first}, "2": {"objects": second}}
    objects = [
        {"image_id": n, "objects": [{"object_id": i, **thing} for i, thing in enumerate(things.values())]}
        for n, things in ((1, first), (2, second))
    ]
    for name, document in (("c.json", instances), ("g.json", graphs), ("v.json", objects)):
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
    assert [
        loaders.coco(tmp_path / "c.json", tmp_path).digest[:16],
        loaders.gqa(tmp_path / "g.json", tmp_path).digest[:16],
        loaders.visual_genome(tmp_path / "v.json", tmp_path).digest[:16],
    ] == ["4ccbd82da1d0c1b7", "e5ef3304c0eac858", "fce419099d73b7a4"]
