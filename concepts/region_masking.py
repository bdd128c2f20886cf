"""Images of which only some regions are visible: the boxes of objects, and the pixels outside all boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from concepts.annotated_object import Box
from concepts.image_source import ImageSource
from groundscope.core.errors import DataError


@dataclass(frozen=True)
class RegionMaskedImage:
    """An image whose hidden regions are replaced by those of a neutral image; itself an `ImageSource`.

    A pixel in several boxes belongs to the smallest one, so each pixel belongs to one region.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> from concepts.region_masking import RegionMaskedImage
    >>> image = gs.scenes.dataset(10)[0].image
    >>> blank = gs.counterfactuals.EditedImage(image, "blank")
    >>> left_half = RegionMaskedImage(image, blank, (gs.Box(0, 0, 56, 112),), (True, False))
    >>> pixels = np.asarray(left_half.load())
    >>> bool((pixels[:, :56] == np.asarray(image.load())[:, :56]).all())
    True
    """

    image: ImageSource
    """The image of the visible regions."""
    neutral: ImageSource
    """The image of the hidden regions; of the same size."""
    boxes: tuple[Box, ...]
    """The regions in pixels; the pixels outside all boxes are one more region, the last."""
    visible: tuple[bool, ...]
    """Whether each region is visible."""

    @property
    def identity(self) -> str:
        """Both identities, the boxes and the visible regions as JSON; one image's identity if all or no regions are visible."""
        if all(self.visible):
            return self.image.identity
        if not any(self.visible):
            return self.neutral.identity
        boxes = [asdict(box) for box in self.boxes]
        return json.dumps(["revealed", self.image.identity, self.neutral.identity, boxes, self.visible])

    def load(self) -> Image.Image:
        """Return the composed RGB image; raises `DataError` if the two images have different sizes."""
        if all(self.visible):
            return self.image.load()
        neutral = self.neutral.load()
        if not any(self.visible):
            return neutral
        image = self.image.load()
        if image.size != neutral.size:
            msg = (
                f"an image of {image.size[0]} x {image.size[1]} pixels needs a neutral image of the same size, not of "
                f"{neutral.size[0]} x {neutral.size[1]} pixels"
            )
            raise DataError(msg)
        mask = np.array(self.visible)[region_of_pixels(self.boxes, image.size)]  # [rows, columns]
        pixels = np.where(mask[..., None], np.asarray(image), np.asarray(neutral))
        return Image.fromarray(pixels.astype(np.uint8))


def region_of_pixels(boxes: Sequence[Box], size: tuple[int, int]) -> np.ndarray:
    """Return the index of each pixel's region, int ``[rows, columns]``; ``len(boxes)`` for pixels outside all boxes.

    Parameters
    ----------
    boxes
        The regions in pixels; of overlapping boxes the smallest has the pixel.
    size
        Width and height of the image.

    Examples
    --------
    >>> from concepts.region_masking import region_of_pixels
    >>> from concepts import Box
    >>> region_of_pixels([Box(0, 0, 2, 1)], (3, 2)).tolist()
    [[0, 0, 1], [1, 1, 1]]
    """
    regions = np.full((size[1], size[0]), len(boxes))
    for i in sorted(range(len(boxes)), key=lambda i: -boxes[i].area):
        box = boxes[i]
        x0, y0 = max(0, int(box.x0)), max(0, int(box.y0))
        regions[y0 : max(y0, int(np.ceil(box.y1))), x0 : max(x0, int(np.ceil(box.x1)))] = i
    return regions
