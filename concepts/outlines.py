"""Outlines of objects in an image: polygons, or a mask of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from concepts.run_length_masks import RunLengthMask
from groundscope.core.errors import DataError

Polygons = tuple[tuple[float, ...], ...]
"""Polygons ``(x0, y0, x1, y1, …)`` in pixels of the loaded image, as in COCO's ``segmentation``."""
Outline = Polygons | RunLengthMask
"""Polygons or a mask; without annotation an empty tuple, which is false."""


def outline_pixels(outline: Outline, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels inside an outline, bool ``[height, width]``.

    Parameters
    ----------
    outline
        Polygons, of which the insides and edges are filled, or a mask.
    size
        Width and height of the image.

    Raises
    ------
    DataError
        If a mask is of an image of another size.

    Examples
    --------
    >>> from concepts.outlines import outline_pixels
    >>> outline_pixels(((0, 0, 2, 0, 2, 1, 0, 1),), (4, 3)).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    if isinstance(outline, RunLengthMask):
        if outline.size != tuple(size):
            msg = f"a mask of {outline.width} x {outline.height} pixels does not fit an image of {size[0]} x {size[1]}"
            raise DataError(msg)
        return outline.pixels()
    from PIL import Image, ImageDraw

    image = Image.new("1", size)
    draw = ImageDraw.Draw(image)
    for polygon in outline:
        draw.polygon(list(polygon), fill=1)
    return np.asarray(image, dtype=bool)


def place_outline(
    outline: Outline, scale: tuple[float, float], offset: tuple[float, float], size: tuple[int, int]
) -> Outline:
    """Return an outline after its image was scaled and moved; `size` is that of the new image (`RunLengthMask.placed`)."""
    if isinstance(outline, RunLengthMask):
        return outline.placed(scale, offset, size)
    return tuple(tuple(x * scale[i % 2] + offset[i % 2] for i, x in enumerate(polygon)) for polygon in outline)


def mirror_outline(outline: Outline, width: int) -> Outline:
    """Return an outline in the image of that width mirrored left to right."""
    if isinstance(outline, RunLengthMask):
        return outline.mirrored()
    return tuple(tuple(x if i % 2 else width - x for i, x in enumerate(polygon)) for polygon in outline)


def outline_record(outline: Outline) -> list[list[float]] | dict[str, object]:
    """Return an outline as values that JSON can represent, in COCO's form."""
    return outline.record() if isinstance(outline, RunLengthMask) else [list(polygon) for polygon in outline]


def outline_from_record(value: Sequence[Sequence[float]] | Mapping[str, Any] | None) -> Outline:
    """Return the outline of a record of `outline_record`; raises `DataError` for a mask that is not one."""
    if isinstance(value, Mapping):
        height, width = value["size"]
        return RunLengthMask(width, height, value["counts"])
    return tuple(tuple(polygon) for polygon in value or ())
