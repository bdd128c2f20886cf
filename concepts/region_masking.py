"""Images of which only some regions are shown: objects' boxes, and what is outside of them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from concepts.schema import Box, ImageSource
from groundscope.core.errors import DataError


@dataclass(frozen=True)
class Revealed:
    """One image where it is shown, another where it is not; both of one size.

    A pixel in several boxes belongs to the smallest of them, so that every pixel belongs to one region.
    """

    base: ImageSource
    """What is shown."""
    neutral: ImageSource
    """What stands in the regions that are not."""
    boxes: tuple[Box, ...]
    """Regions in pixels; what is outside of all boxes is the last region."""
    shown: tuple[bool, ...]
    """For each box, then for the rest, whether it is shown."""

    @property
    def identity(self) -> str:
        """Both images and what is shown of the one; the image's own identity where all or nothing of it is."""
        if all(self.shown):
            return self.base.identity
        if not any(self.shown):
            return self.neutral.identity
        boxes = [asdict(box) for box in self.boxes]
        return json.dumps(["revealed", self.base.identity, self.neutral.identity, boxes, self.shown])

    def load(self) -> Image.Image:
        """Return the composed RGB image; raises `DataError` where the two have unlike sizes."""
        if all(self.shown):
            return self.base.load()
        neutral = self.neutral.load()
        if not any(self.shown):
            return neutral
        base = self.base.load()
        if base.size != neutral.size:
            msg = f"an image of {base.size[0]} x {base.size[1]} pixels needs a neutral one of that size, not {neutral.size}"
            raise DataError(msg)
        mask = np.array(self.shown)[owners(self.boxes, base.size)]  # [rows, columns]
        pixels = np.where(mask[..., None], np.asarray(base), np.asarray(neutral))
        return Image.fromarray(pixels.astype(np.uint8))


def owners(boxes: Sequence[Box], size: tuple[int, int]) -> np.ndarray:
    """Return which region each pixel belongs to, int ``[rows, columns]``: a box's number, or ``len(boxes)`` for the rest.

    Parameters
    ----------
    boxes
        Regions in pixels.
    size
        Width and height of the image.
    """
    owner = np.full((size[1], size[0]), len(boxes))
    for i in sorted(range(len(boxes)), key=lambda i: -boxes[i].area):
        box = boxes[i]
        x0, y0 = max(0, int(box.x0)), max(0, int(box.y0))
        owner[y0 : max(y0, int(np.ceil(box.y1))), x0 : max(x0, int(np.ceil(box.x1)))] = i
    return owner
