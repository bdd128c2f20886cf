"""Token positions when an image processor crops: a painted spot changes the pixel values of the patch that contains it.

No network runs here: the oracle is the processor's own output.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from activation_store.tracing.example_table import build_row
from concepts.annotated_object import AnnotatedObject, Box
from groundscope.core.errors import DataError, ModelError
from lvlm import Lvlm, wrap_lvlm
from tests.toys.examples import Picture, example
from tests.toys.families import BUILDERS, build
from tests.toys.tiled_families import PINPOINTS

SPOT = 6
CROP = {"height": 56, "width": 56}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "not cropped": {"do_center_crop": False, "size": CROP},
    "short edge, cropped": {"do_center_crop": True, "size": {"shortest_edge": 84}, "crop_size": CROP},
    "stretched, cropped": {"do_center_crop": True, "size": {"height": 112, "width": 98}, "crop_size": CROP},
    "not resized, cropped": {"do_center_crop": True, "do_resize": False, "crop_size": CROP},
    "padded by the crop": {"do_center_crop": True, "size": {"height": 42, "width": 28}, "crop_size": CROP},
}
SINGLE = ("llava", "florence2", "chameleon", "paligemma", "blip2_opt")
"""Families whose processors resize, then crop the middle if do_center_crop is set."""
OTHERS = [family for family in BUILDERS if family not in (*SINGLE, "qwen2_5_vl")]
"""Without Qwen2.5-VL, whose tower sorts patches by window after the pixels: tests/lvlm/test_families.py runs it."""
CASES = [(f, "default") for f in OTHERS] + [(f, s) for f in SINGLE for s in SETTINGS]


def lvlm_with(family: str, settings: dict[str, Any]) -> Lvlm:
    network, processor = build(family)
    processor = copy.copy(processor)
    if processor.image_processor is not None:
        processor.image_processor = copy.deepcopy(processor.image_processor)
        for name, value in settings.items():
            sizes = {"size", "crop_size"}
            kind = type(getattr(processor.image_processor, "size", None))
            wrapped = kind(**value) if name in sizes and kind is not dict else value
            setattr(processor.image_processor, name, wrapped)
    return wrap_lvlm(network, processor, name=family, validate=False)


def views(lvlm: Lvlm, image: Image.Image) -> tuple[np.ndarray, Any]:
    """Return pixel values, ``[views, C, H, W]`` or a row for each patch, and what the image became."""
    look = lvlm.image_encoding.encode(lvlm, image)
    values = look.inputs["pixel_values"].numpy()
    return values if values.ndim == 2 else values.reshape(-1, *values.shape[-3:]), look


def changed(before: np.ndarray, after: np.ndarray, lattices: Any, n: int) -> np.ndarray:
    """Return how much the pixels of each patch of a view changed, by the order of its patches over the image."""
    lattice = lattices[n]
    if before.ndim == 2:  # packed: a row of values for each patch of the tower's sequence
        return np.abs(after - before).sum(1)[list(lattice.positions)]
    grid, change = lattice.grid, np.abs(after[n] - before[n]).sum(0)
    high, wide = change.shape[0] // grid.rows, change.shape[1] // grid.columns
    return (
        change[: high * grid.rows, : wide * grid.columns]
        .reshape(grid.rows, high, grid.columns, wide)
        .sum((1, 3))
        .ravel()
    )


@pytest.mark.parametrize(("family", "setting"), CASES)
def test_an_object_has_the_patches_whose_pixels_show_it(family: str, setting: str) -> None:
    lvlm = lvlm_with(family, SETTINGS[setting])
    width, height = (112, 112) if family in SINGLE else (140, 98)
    pixels = np.full((height, width, 3), 127, np.uint8)
    base, look = views(lvlm, Image.fromarray(pixels))
    stack = next(s for s in ("vision", "projector", "decoder") if s in look.views and look.views[s][0].grid)
    if family == "florence2":
        stack = "projector"
    lattices, hidden, changes = look.views[stack], 0, []
    places = [(x, y) for x in range(4, width - SPOT, 14) for y in range(4, height - SPOT, 14)]
    for x, y in places[::5]:
        spot = pixels.copy()
        spot[y : y + SPOT, x : x + SPOT] = (255, 0, 40)
        values, _ = views(lvlm, Image.fromarray(spot))
        for n, lattice in enumerate(lattices):
            tokens = lattice.grid.patches(Box(x, y, x + SPOT, y + SPOT))
            change = changed(base, values, lattices, n)
            order = np.sort(change)
            if not order[-1]:
                assert not tokens, (x, y, lattice.kind)
                hidden += 1
            elif order[-2] < 0.8 * order[-1]:  # else the spot is in two patches alike
                changes.append((order[-1], int(change.argmax()) in tokens, (x, y, lattice.kind)))
    # A spot next to a view is blurred into its edge.
    clear = [(right, place) for amount, right, place in changes if amount > 0.3 * max(a for a, _, _ in changes)]
    assert len(clear) >= 3
    assert all(right for right, _ in clear), clear
    if setting in {"stretched, cropped", "not resized, cropped"}:
        assert hidden > 0


def test_an_object_that_is_cropped_away_has_no_token() -> None:
    lvlm = lvlm_with("llava", SETTINGS["not resized, cropped"])
    boxes = {"out": Box(0, 0, 20, 20), "in": Box(56, 56, 70, 70)}
    things = tuple(AnnotatedObject(name, "cup", box) for name, box in boxes.items())
    things += (AnnotatedObject("nowhere", "cup", None),)
    picture = Picture("gray", np.full((112, 112, 3), 127, np.uint8))
    encoding = lvlm.encode(replace(example(), image=picture, objects=things, subject="nowhere"))
    # Patches of 14 pixels from pixel 28 on: pixels 56 to 70 are the third patch of the third row.
    assert encoding.tokens.objects == {"out": (), "in": (10,)}
    table = build_row(lvlm, encoding, None, [])
    assert (table["box_ids"], table["boxes"]) == (["out", "in"], [[0, 0, 20, 20], [56, 56, 70, 70]])


def test_tiles_that_are_cropped_are_refused() -> None:
    lvlm = lvlm_with("llava_next", {"size": {"shortest_edge": 84}, "image_grid_pinpoints": PINPOINTS})
    with pytest.raises(ModelError, match=r"resizes tiles of 56 pixels to 84 and crops their center, .* equal values"):
        lvlm.image_encoding.encode(lvlm, Image.new("RGB", (112, 112)))


def test_an_unknown_resize_before_a_crop_is_refused() -> None:
    lvlm = lvlm_with("llava", {"do_center_crop": True, "size": {"shortest_edge": 60, "longest_edge": 80}})
    with pytest.raises(ModelError, match=r"set its size to height and width, or to a shortest_edge alone"):
        lvlm.image_encoding.encode(lvlm, Image.new("RGB", (112, 100)))


def test_a_very_long_image_is_refused_before_it_is_resized() -> None:
    for family in ("llava", "chameleon"):
        lvlm = lvlm_with(family, {"size": {"shortest_edge": 336}, "crop_size": {"height": 56, "width": 56}})
        words = r"would resize an image of 1 x 1000 pixels to 336 x 336000, .*; crop it"
        with pytest.raises(DataError, match=words):
            lvlm.image_encoding.encode(lvlm, Image.new("RGB", (1, 1000)))


def test_a_prompt_takes_no_box_without_area() -> None:
    lvlm = lvlm_with("llava", {})
    with pytest.raises(DataError, match="object 'o' has the box"):
        lvlm.encode_prompt(lvlm.prompt("What?"), [Image.new("RGB", (56, 56))], boxes={"o": (0, Box(3, 3, 3, 9))})
