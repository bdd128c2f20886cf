"""Outlines of objects in annotation files: polygons in pixels."""

from __future__ import annotations

from typing import Any

from concepts.reading.record import Record
from groundscope.core.errors import DataError

Outline = tuple[tuple[float, ...], ...]
"""Polygons ``(x0, y0, x1, y1, …)`` in pixels."""


def read_polygons(record: Record, name: str) -> Outline:
    """Return the polygons in a field: lists of coordinates as in COCO, or of points as in VAW.

    A missing or null field, and a run-length encoding (of crowds in COCO), give no polygon; neither do polygons of less than
    three points.

    Raises
    ------
    DataError
        If the field holds anything else.

    Examples
    --------
    >>> from concepts.reading.outlines import read_polygons
    >>> from concepts.reading.record import Record
    >>> read_polygons(Record("a.json: record 1", {"segmentation": [[0, 0, 4, 0, 4, 3]]}), "segmentation")
    ((0.0, 0.0, 4.0, 0.0, 4.0, 3.0),)
    >>> read_polygons(Record("a.json: record 1", {"instance_polygon": [[[0, 0], [4, 0], [4, 3]]]}), "instance_polygon")
    ((0.0, 0.0, 4.0, 0.0, 4.0, 3.0),)
    """
    value = record.values.get(name)
    if value is None or isinstance(value, dict):
        return ()
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise DataError(_problem(record, name))
    polygons = (tuple(_numbers(record, name, polygon)) for polygon in value)
    return tuple(polygon for polygon in polygons if len(polygon) >= 6)


def _numbers(record: Record, name: str, polygon: list[Any]) -> list[float]:
    flat = [x for point in polygon for x in (point if isinstance(point, list) else [point])]
    if len(flat) % 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9 for x in flat):
        raise DataError(_problem(record, name))
    return [float(x) for x in flat]


def _problem(record: Record, name: str) -> str:
    return f"{record.where}: field '{name}' must hold polygons, lists of x and y in pixels, or null"
