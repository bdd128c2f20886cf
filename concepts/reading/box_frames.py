"""Boxes of annotation files, in the frame of the image as it is loaded.

Annotations give boxes in pixels of some width and height. An image file may have been resized since, or carry an EXIF
orientation, by which it is turned when it is loaded; the annotated size decides which frame its boxes are in.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from concepts.image_files import FileImage, ImageHeader
from concepts.reading.record import Record
from concepts.schema import Box
from groundscope.core.errors import DataError

OVERSHOOT = 1.0
"""Pixels by which a box may pass the edge of the image, as of rounding; it is clipped."""
ROUNDING = 0.01
"""Pixels of overshoot that are left in place: COCO rounds x and width to hundredths, so that their sum may pass the edge."""
TURNED = "boxes of images with an EXIF orientation, in a frame that the annotated size does not decide"
EMPTY = "boxes without area"
OUTSIDE = "boxes that pass the edge of the image"


def box_numbers(record: Record, *names: str) -> tuple[float, float, float, float]:
    """Return the x, y, width and height of a record; raises `DataError` for a negative width or height, or infinity."""
    x, y, width, height = record.numbers(*names)
    for name, value in zip(names[2:], (width, height), strict=True):
        if value < 0:
            msg = f"{record.where}: field '{name}' is {value:g}; the width and height of a box must not be negative"
            raise DataError(msg)
    if not math.isfinite(x + width) or not math.isfinite(y + height):
        msg = f"{record.where}: the box {x:g}, {y:g}, {width:g}, {height:g} ends at infinity"
        raise DataError(msg)
    return x, y, width, height


def annotated_size(record: Record) -> tuple[int, int] | None:
    """Return the width and height of a record; None where it has neither.

    Raises
    ------
    DataError
        Where one of them is missing, or either is no positive whole number.
    """
    if record.values.get("width") is None and record.values.get("height") is None:
        return None
    width, height = record.numbers("width", "height")
    for name, value in (("width", width), ("height", height)):
        if value < 1 or value != int(value):
            msg = f"{record.where}: field '{name}' must hold a positive whole number, not {value:g}"
            raise DataError(msg)
    return int(width), int(height)


@dataclass(frozen=True, slots=True)
class BoxFrame:
    """How the boxes of one annotated image lie in the image as `FileImage.load` returns it."""

    size: tuple[int, int]
    """Width and height of the loaded image."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Pixels of the image for each pixel of the annotation, along x and y of the annotation."""
    orientation: int = 1
    """EXIF orientation that is applied to the boxes; 1 where they are drawn on the upright image."""
    decided: bool = True
    """Whether the frame is known; without, an image has no boxes."""

    def place(self, x: float, y: float, width: float, height: float, left_out: Counter[str]) -> Box | None:
        """Return a box in pixels of the loaded image.

        An overshoot of at most `OVERSHOOT` pixels is clipped. None, counted by reason in `left_out`, for a box that has
        no area, passes the edge by more, or is in a frame that is not decided.
        """
        if not self.decided:
            left_out[TURNED] += 1
            return None
        if not width or not height:
            left_out[EMPTY] += 1
            return None
        box = Box(x, y, x + width, y + height)
        if self.scale != (1.0, 1.0):
            across, down = self.scale
            box = Box(box.x0 * across, box.y0 * down, box.x1 * across, box.y1 * down)
        if self.orientation != 1:
            box = _turned(box, self.size, self.orientation)
        if 0 <= box.x0 < box.x1 <= self.size[0] and 0 <= box.y0 < box.y1 <= self.size[1]:
            return box
        if min(box.x0, box.y0) < -OVERSHOOT or max(box.x1 - self.size[0], box.y1 - self.size[1]) > OVERSHOOT:
            left_out[OUTSIDE] += 1
            return None
        clipped = Box(max(box.x0, 0.0), max(box.y0, 0.0), _end(box.x1, self.size[0]), _end(box.y1, self.size[1]))
        if not clipped.area:
            left_out[OUTSIDE] += 1
            return None
        return clipped


def box_frame(picture: FileImage, annotated: tuple[int, int] | None) -> BoxFrame:
    """Decide the frame of an image's boxes.

    Parameters
    ----------
    picture
        The image.
    annotated
        Width and height that its annotation gives; None where it gives none.

    Returns
    -------
    BoxFrame
        Boxes are as drawn where the annotated size is the image's. They are scaled where the image has the same
        proportions, and turned with the image where the annotated size is that of the stored pixels, before the EXIF
        orientation is applied. Where an image has an orientation and the annotated size fits both frames, or is not
        given, the frame is not decided.

    Raises
    ------
    DataError
        Where the image has other proportions than the annotation.
    """
    header = picture.header
    upright = header.upright_size
    if annotated is None:
        return BoxFrame(upright, decided=header.orientation == 1)
    # Size of the pixels that the boxes were drawn on, and the orientation that leads from there to the loaded image.
    frames = [(upright, 1)] if header.orientation == 1 else [(upright, 1), (header.size, header.orientation)]
    fits = [frame for frame in frames if frame[0] == annotated]
    fits = fits or [frame for frame in frames if _same_proportions(frame[0], annotated)]
    if not fits:
        msg = _mismatch(picture, header, annotated)
        raise DataError(msg)
    size, orientation = fits[0]
    scale = (size[0] / annotated[0], size[1] / annotated[1])
    return BoxFrame(upright, scale, orientation, decided=len(fits) == 1)


def _mismatch(picture: FileImage, header: ImageHeader, annotated: tuple[int, int]) -> str:
    width, height = header.upright_size
    turned = f", {header.size[0]} x {header.size[1]} before its EXIF orientation" if header.orientation != 1 else ""
    return (
        f"image '{picture.path}' is {width} x {height} pixels{turned}, its annotation is of {annotated[0]} x {annotated[1]}: "
        "the boxes cannot be placed; use the image that was annotated, or one resized in proportion"
    )


def _same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other resized in proportion, to a pixel of the smaller."""
    small, large = sorted((size, other), key=math.prod)
    return any(abs(small[1 - i] - large[1 - i] * small[i] / large[i]) <= 1 for i in (0, 1))


def _turned(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Apply an EXIF orientation to a box of the stored pixels, for an image of some (width, height) after it."""
    x0, y0, x1, y1 = (box.y0, box.x0, box.y1, box.x1) if orientation >= 5 else (box.x0, box.y0, box.x1, box.y1)
    width, height = size
    if orientation in {2, 3, 6, 7}:
        x0, x1 = width - x1, width - x0
    if orientation in {3, 4, 7, 8}:
        y0, y1 = height - y1, height - y0
    return Box(x0, y0, x1, y1)


def _end(value: float, limit: int) -> float:
    return value if value <= limit + ROUNDING else float(limit)
