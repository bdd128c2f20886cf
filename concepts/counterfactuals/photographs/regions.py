"""Pixels of an object in an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from concepts.annotated_object import Box
from concepts.outlines import Outline, outline_pixels


def region_mask(size: tuple[int, int], box: Box, outline: Outline = ()) -> np.ndarray:
    """Return the pixels inside an outline, or inside a box if there is no outline.

    Parameters
    ----------
    size
        Width and height of the image.
    box
        Box of the object in pixels; the part outside of the image is ignored.
    outline
        Polygons or mask of the object.

    Returns
    -------
    ndarray
        Bool ``[height, width]``.

    Raises
    ------
    DataError
        If the outline is a mask of an image of another size.

    Examples
    --------
    >>> from concepts.counterfactuals.photographs.regions import region_mask
    >>> from concepts.annotated_object import Box
    >>> int(region_mask((8, 6), Box(1, 2, 4, 4)).sum())
    6
    """
    if outline:
        return outline_pixels(outline, size)
    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    mask[_span(box.y0, box.y1, height), _span(box.x0, box.x1, width)] = True
    return mask


def _span(start: float, stop: float, size: int) -> slice:
    """Return the pixels of one axis that a box covers at least by half, and at least one."""
    first = min(max(round(start), 0), size - 1)
    return slice(first, max(min(round(stop), size), first + 1))


def share_covered(box: Box, others: Sequence[Box]) -> float:
    """Return the largest share of a box that one of the other boxes covers."""
    return max((box.intersection(other) / box.area for other in others), default=0.0)
