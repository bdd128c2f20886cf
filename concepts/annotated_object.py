"""Annotated objects of an image, and their boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from concepts.outlines import Outline, outline_record
from groundscope.core.errors import DataError


@dataclass(frozen=True, slots=True)
class Box:
    """Axis-aligned box in pixels, half open: columns ``x0 .. x1-1``, rows ``y0 .. y1-1``.

    Examples
    --------
    >>> import groundscope as gs
    >>> box = gs.Box(10, 20, 14, 23)
    >>> box.area, box.center, box.intersection(gs.Box(12, 20, 30, 30))
    (12, (12.0, 21.5), 6)
    """

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Area in square pixels; 0 for an empty box."""
        return max(0.0, self.x1 - self.x0) * max(0.0, self.y1 - self.y0)

    @property
    def center(self) -> tuple[float, float]:
        """Center ``(x, y)`` in pixels."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def intersection(self, other: Box) -> float:
        """Return the area in square pixels of the overlap with another box."""
        return Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1)).area


def check_box(box: Box, name: str) -> None:
    """Raise `DataError` for an object's box that is not finite, has a negative side or has no area."""
    sides = (box.x0, box.y0, box.x1, box.y1)
    if not all(math.isfinite(side) for side in sides) or min(box.x0, box.y0) < 0 or not box.area:
        msg = (
            f"object '{name}' has the box {', '.join(f'{side:g}' for side in sides)} (x0, y0, x1, y1): its sides must be "
            "finite, not negative, and x0 < x1, y0 < y1; clip it to the image, or give None for an object without a box"
        )
        raise DataError(msg)


@dataclass(frozen=True, slots=True)
class AnnotatedObject:
    """An annotated object in an image.

    Raises
    ------
    DataError
        For a box that is not finite, has a negative side or has no area.

    Examples
    --------
    >>> import groundscope as gs
    >>> apple = gs.AnnotatedObject("o1", "apple", gs.Box(10, 20, 40, 50), {"color": "green"})
    >>> apple.noun, apple.attributes["color"], apple.require_box().area
    ('apple', 'green', 900)
    """

    id: str
    noun: str
    box: Box | None
    """Its box in pixels of the loaded image; None if unknown, and then no image token belongs to the object."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Kind of attribute to its value, such as ``{"color": "green", "size": "big"}``; empty without annotation."""
    outline: Outline = ()
    """Polygons ``(x0, y0, x1, y1, …)`` in pixels of the loaded image, or a mask (`RunLengthMask`); empty without annotation."""

    def __post_init__(self) -> None:
        if self.box is not None:
            check_box(self.box, self.id)

    def record(self) -> dict[str, object]:
        """Return the fields as values that JSON can represent; without an empty outline."""
        outline = {"outline": outline_record(self.outline)} if self.outline else {}
        box = None if self.box is None else asdict(self.box)
        return {"id": self.id, "noun": self.noun, "box": box, "attributes": dict(self.attributes), **outline}

    def require_box(self) -> Box:
        """Return the box; raises `DataError` for an object without one."""
        if self.box is None:
            msg = f"object '{self.id}' ({self.noun}) has no box in its annotation, but one is needed here"
            raise DataError(msg)
        return self.box
