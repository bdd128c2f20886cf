"""Convert annotated boxes into pixels of the loaded image, for images that were resized or have an EXIF orientation.

Annotations give boxes in pixels of an image of some width and height. The image file may have been resized later, or have an
EXIF orientation, by which loading rotates or mirrors it. The annotated width and height show which of these frames the boxes
refer to.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from concepts.annotated_object import Box
from concepts.image_files import FileImage, ImageHeader
from concepts.outlines import Outline, place_outline
from concepts.reading.record import Record
from concepts.run_length_masks import RunLengthMask
from groundscope.core.errors import DataError

OVERSHOOT = 1.0
"""Largest distance in pixels by which a box may extend beyond the image, for example by rounding; it is clipped."""
ROUNDING = 0.01
"""Distance in pixels that is not clipped: COCO rounds x and width to hundredths, so their sum may exceed the image's width."""
UNKNOWN_FRAME = "boxes of images with an EXIF orientation, if the annotated size does not show whether it was applied"
EMPTY = "boxes without area"
OUTSIDE = "boxes that extend beyond the image"


def box_numbers(record: Record, *names: str) -> tuple[float, float, float, float]:
    """Return the x, y, width and height of a box in a record.

    Raises
    ------
    DataError
        For values that are not numbers, a negative width or height, or a box that ends at infinity.
    """
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
    """Return the width and height of the annotated image in a record; None if it has neither.

    Raises
    ------
    DataError
        If only one of them is present, or one is not a positive whole number.
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
    """Converts annotated boxes of one image to pixels of the image as `FileImage.load` returns it."""

    size: tuple[int, int]
    """Width and height of the loaded image."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Pixels of the image per pixel of the annotation, along x and y of the annotation."""
    orientation: int = 1
    """EXIF orientation to apply to the boxes; 1 if they were drawn on the upright image."""
    is_known: bool = True
    """Whether the transformation is known; if not, all boxes are left out."""

    def place(self, x: float, y: float, width: float, height: float, left_out: Counter[str]) -> Box | None:
        """Return a box in pixels of the loaded image, or None if it is left out.

        A box that extends beyond the image by at most `OVERSHOOT` pixels is clipped. Left out, and counted by reason in
        `left_out`, are boxes without area, boxes that extend further, and all boxes if the transformation is unknown.
        """
        if not self.is_known:
            left_out[UNKNOWN_FRAME] += 1
            return None
        if not width or not height:
            left_out[EMPTY] += 1
            return None
        box = Box(x, y, x + width, y + height)
        if self.scale != (1.0, 1.0):
            scale_x, scale_y = self.scale
            box = Box(box.x0 * scale_x, box.y0 * scale_y, box.x1 * scale_x, box.y1 * scale_y)
        if self.orientation != 1:
            box = _apply_orientation(box, self.size, self.orientation)
        if 0 <= box.x0 < box.x1 <= self.size[0] and 0 <= box.y0 < box.y1 <= self.size[1]:
            return box
        if min(box.x0, box.y0) < -OVERSHOOT or max(box.x1 - self.size[0], box.y1 - self.size[1]) > OVERSHOOT:
            left_out[OUTSIDE] += 1
            return None
        clipped = Box(
            max(box.x0, 0.0), max(box.y0, 0.0), _clip_end(box.x1, self.size[0]), _clip_end(box.y1, self.size[1])
        )
        if not clipped.area:
            left_out[OUTSIDE] += 1
            return None
        return clipped

    def place_outline(self, outline: Outline, where: str) -> Outline:
        """Return an outline in pixels of the loaded image; none if the image was rotated or mirrored.

        Raises
        ------
        DataError
            If a mask is not of the annotated image's size; the message begins with `where`.
        """
        if not self.is_known or self.orientation != 1:
            return ()
        if isinstance(outline, RunLengthMask):
            annotated = tuple(round(side / factor) for side, factor in zip(self.size, self.scale, strict=True))
            if outline.size != annotated:
                msg = (
                    f"{where}: its mask has {outline.width} x {outline.height} pixels, its image {annotated[0]} x "
                    f"{annotated[1]}; a mask must have the width and height of its image ('size' is height, width)"
                )
                raise DataError(msg)
        if self.scale == (1.0, 1.0):
            return outline
        return place_outline(outline, self.scale, (0.0, 0.0), self.size)


def box_frame(image: FileImage, annotated_size: tuple[int, int] | None) -> BoxFrame:
    """Determine the transformation of an image's annotated boxes.

    Parameters
    ----------
    image
        The image.
    annotated_size
        Width and height in the annotation; None if it has none.

    Returns
    -------
    BoxFrame
        Boxes are unchanged if the annotated size is that of the loaded image, scaled if it has the same proportions, and
        rotated or mirrored if it is that of the stored pixels, before the EXIF orientation. For an image with an
        orientation, the transformation is unknown if the annotated size fits both, or is None.

    Raises
    ------
    DataError
        If the image has other proportions than the annotation.
    """
    header = image.header
    upright = header.upright_size
    if annotated_size is None:
        return BoxFrame(upright, is_known=header.orientation == 1)
    # Possible sizes of the annotated image, each with the orientation that leads from it to the loaded image.
    frames = [(upright, 1)] if header.orientation == 1 else [(upright, 1), (header.size, header.orientation)]
    matching = [frame for frame in frames if frame[0] == annotated_size]
    matching = matching or [frame for frame in frames if _same_proportions(frame[0], annotated_size)]
    if not matching:
        msg = _mismatch(image, header, annotated_size)
        raise DataError(msg)
    size, orientation = matching[0]
    scale = (size[0] / annotated_size[0], size[1] / annotated_size[1])
    return BoxFrame(upright, scale, orientation, is_known=len(matching) == 1)


def _mismatch(image: FileImage, header: ImageHeader, annotated_size: tuple[int, int]) -> str:
    width, height = header.upright_size
    stored = f" ({header.size[0]} x {header.size[1]} before its EXIF orientation)" if header.orientation != 1 else ""
    return (
        f"image '{image.path}' has {width} x {height} pixels{stored}, but its annotation is of an image with "
        f"{annotated_size[0]} x {annotated_size[1]} pixels; use the annotated image, or a copy resized in proportion"
    )


def _same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other resized in proportion, up to one pixel of the smaller size."""
    small, large = sorted((size, other), key=math.prod)
    return any(abs(small[1 - i] - large[1 - i] * small[i] / large[i]) <= 1 for i in (0, 1))


def _apply_orientation(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Apply an EXIF orientation to a box of the stored pixels; `size` is the image's width and height afterwards."""
    x0, y0, x1, y1 = (box.y0, box.x0, box.y1, box.x1) if orientation >= 5 else (box.x0, box.y0, box.x1, box.y1)
    width, height = size
    if orientation in {2, 3, 6, 7}:
        x0, x1 = width - x1, width - x0
    if orientation in {3, 4, 7, 8}:
        y0, y1 = height - y1, height - y0
    return Box(x0, y0, x1, y1)


def _clip_end(value: float, limit: int) -> float:
    """Return the right or lower edge of a box, clipped to the image unless it is beyond it by rounding only."""
    return value if value <= limit + ROUNDING else float(limit)
