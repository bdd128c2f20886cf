"""Give one object of a photograph another color.

The mean color of the object's pixels is moved to a typical color of the target term in CIELAB, lightness included (a blue of
a yellow's lightness is a pale blue, a yellow of a blue's lightness an olive); deviations from the mean, that is shading and
texture, stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from concepts.annotated_object import Box
from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals.photographs.color_names import HUES, MIN_SATURATION, PROTOTYPES, color_name, hue_distance
from concepts.counterfactuals.photographs.regions import region_mask
from concepts.image_source import ImageSource
from concepts.outlines import Outline, outline_record
from concepts.schema import ConceptDataset, Example

HUE_TOLERANCE = 0.06
"""Without an outline, only pixels of the box whose hue is this close to the object's color are changed."""
MIN_SHARE = 0.25
"""Smallest share of an object's region whose pixels change."""
MAX_LEAK = 0.25
"""Without an outline, largest share of the pixels next to the box that have the object's color: the background must differ."""
_RING = 4


@dataclass(frozen=True)
class RecoloredImage:
    """An image source with one region in another color.

    Examples
    --------
    >>> import groundscope as gs
    >>> from concepts.counterfactuals.photographs.color_names import color_name
    >>> from concepts.counterfactuals.photographs.recolor import RecoloredImage
    >>> example = next(e for e in gs.scenes.dataset(20) if e.kind == "color" and e.named_object().attributes["color"] == "red")
    >>> box = example.named_object().box
    >>> image = RecoloredImage(example.image, box, "red", "blue")
    >>> color_name(image.median_color())
    'blue'
    """

    base: ImageSource
    box: Box
    """Box of the object in pixels."""
    color: str
    """Present color of the object, a key of `HUES`."""
    target: str
    """New color, a key of `HUES`."""
    outline: Outline = ()
    """Polygons or mask of the object; empty if only its box is known."""

    @property
    def identity(self) -> str:
        """The edit and the identity of the base as JSON."""
        outline = outline_record(self.outline)
        return json.dumps(["recolor", asdict(self.box), self.color, self.target, outline, self.base.identity])

    def mask(self) -> np.ndarray:
        """Return the pixels that change, bool ``[height, width]``."""
        return _changed(self.base.load(), self.box, self.color, self.outline)

    def load(self) -> Image.Image:
        """Return the recolored RGB image."""
        image = self.base.load()
        return _recolored(image, _changed(image, self.box, self.color, self.outline), self.target)

    def median_color(self) -> tuple[float, float, float]:
        """Return the median RGB color of the changed pixels after the change."""
        image = self.base.load()
        mask = _changed(image, self.box, self.color, self.outline)
        return _median(_recolored(image, mask, self.target), mask)


def _changed(image: Image.Image, box: Box, color: str, outline: Outline) -> np.ndarray:
    """Return the pixels of the object that have its color; with an outline all its saturated pixels."""
    region = region_mask(image.size, box, outline)
    hsv = np.asarray(image.convert("HSV"), dtype=np.float64) / 255
    saturated = hsv[..., 1] >= MIN_SATURATION
    if outline:
        return region & saturated
    distance = np.abs(hsv[..., 0] - HUES[color]) % 1
    return region & saturated & (np.minimum(distance, 1 - distance) <= HUE_TOLERANCE)


def _recolored(image: Image.Image, mask: np.ndarray, target: str) -> Image.Image:
    if not mask.any():
        return image
    from skimage.color import lab2rgb, rgb2lab

    pixels = np.asarray(image, dtype=np.float64) / 255
    lab = rgb2lab(pixels)
    goal = rgb2lab(np.array([[PROTOTYPES[target]]], dtype=np.float64) / 255)[0, 0]
    lab[mask] += goal - lab[mask].mean(axis=0)
    # A larger b would be a negative tristimulus value Z, which is no color.
    lab[..., 2] = np.minimum(lab[..., 2], 200 * (lab[..., 0] + 16) / 116 - 1e-3)
    changed = np.rint(255 * np.clip(lab2rgb(lab), 0, 1)).astype(np.uint8)
    # All other pixels keep their exact values: the round trip through CIELAB may change them by one.
    return Image.fromarray(np.where(mask[..., None], changed, np.asarray(image)))


def _median(image: Image.Image, mask: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = np.median(np.asarray(image)[mask], axis=0)
    return float(red), float(green), float(blue)


def recolor_pairs(
    data: ConceptDataset, left_out: Counter[str], *, placebo: bool = False
) -> Iterator[CounterfactualPair]:
    """Yield pairs of color questions: the object of the question gets another color.

    A pair is accepted if the color term of the median changed pixel is the target, so that the image shows what the new
    answer says.

    Parameters
    ----------
    data
        Examples with yes-no questions of kind ``color`` about an object with a box.
    left_out
        Counts of examples without a pair, by reason; increased.
    placebo
        Change the color to a third one instead, so that the true answer stays "no".
    """
    for example in data:
        if example.kind != "color" or set(example.candidates) != {"yes", "no"}:
            continue
        subject, named_color = example.named_object(), example.question.rstrip("?").rsplit(" ", 1)[-1]
        color = subject.attributes.get("color") if subject else None
        if subject is None or subject.box is None:
            left_out["questions about objects without a box"] += 1
        elif color is None or color not in HUES:
            left_out["objects without a chromatic color"] += 1
        elif (target := _target(example.answer, color, named_color, placebo=placebo)) is None:
            left_out["questions about colors that no recoloring makes"] += not placebo
        else:
            image = RecoloredImage(example.image, subject.box, color, target, subject.outline)
            if (problem := _problem(image)) is not None:
                left_out[problem] += 1
            else:
                yield _pair(example, image, subject.noun, subject.id, named_color, placebo=placebo)


def _target(answer: str, color: str, named_color: str, *, placebo: bool) -> str | None:
    """Return the new color of the object, which changes the true answer, or for a placebo does not."""
    others = [name for name in HUES if name not in {color, named_color}]
    # The farthest hue: a fixed choice that is easy to see.
    farthest = max(others, key=lambda name: hue_distance(HUES[name], HUES[color]))
    if placebo:
        return farthest if answer == "no" else None
    if answer == "yes":
        return farthest
    return named_color if named_color in PROTOTYPES else None


def _problem(image: RecoloredImage) -> str | None:
    """Return why an image does not show the new color, or None."""
    base = image.base.load()
    mask = image.mask()
    if mask.sum() < MIN_SHARE * region_mask(base.size, image.box, image.outline).sum():
        return "objects of which less than a quarter of the pixels has the annotated color"
    if not image.outline and color_name(_median(base, mask)) != image.color:
        return "objects whose pixels do not have the annotated color"
    if not image.outline and _leak(base, image.box, image.color) > MAX_LEAK:
        return "objects on a background of the same color"
    if color_name(_median(_recolored(base, mask, image.target), mask)) != image.target:
        return "objects that do not show the new color"
    return None


def _leak(image: Image.Image, box: Box, color: str) -> float:
    """Return the share of the pixels in a ring around the box that would change if they were in it; 0 without such pixels."""
    wide = Box(max(box.x0 - _RING, 0), max(box.y0 - _RING, 0), box.x1 + _RING, box.y1 + _RING)
    ring = region_mask(image.size, wide) & ~region_mask(image.size, box)
    return float(_changed(image, wide, color, ())[ring].mean()) if ring.any() else 0.0


def _pair(
    example: Example, image: RecoloredImage, noun: str, subject: str, named_color: str, *, placebo: bool
) -> CounterfactualPair:
    change = f"{noun}: {image.color} -> {image.target}"
    truth = image.target == named_color
    labels = dict(example.labels)
    for name, value in ((image.color, False), (image.target, True)):
        if f"attribute:{name}" in labels:
            labels[f"attribute:{name}"] = value
    labels["attribute:named"] = truth
    objects = tuple(
        replace(o, attributes={**o.attributes, "color": image.target}) if o.id == subject else o
        for o in example.objects
    )
    corrupt = replace(
        example, id=f"{example.id}|{change}", image=image, answer="yes" if truth else "no", labels=labels,
        objects=objects,
    )  # fmt: skip
    return CounterfactualPair(example, corrupt, "color", change, "recolor", placebo=placebo)
