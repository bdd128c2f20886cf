"""Outlines of objects in annotation files: polygons in pixels, or masks as run lengths."""

from __future__ import annotations

from typing import Any

from concepts.outlines import Outline
from concepts.reading.record import Record, abbreviate
from concepts.run_length_masks import RunLengthMask
from groundscope.core.errors import DataError


def read_outline(record: Record, name: str) -> Outline:
    """Return the outline in a field: polygons as in COCO, lists of points as in VAW, or run lengths as COCO's crowds have.

    A missing or null field gives no outline; neither do polygons of less than three points, and masks without pixels.

    Raises
    ------
    DataError
        If the field holds anything else, or a mask whose run lengths do not sum to its pixels.

    Examples
    --------
    >>> from concepts.reading.outlines import read_outline
    >>> from concepts.reading.record import Record
    >>> read_outline(Record("a.json: record 1", {"segmentation": [[0, 0, 4, 0, 4, 3]]}), "segmentation")
    ((0.0, 0.0, 4.0, 0.0, 4.0, 3.0),)
    >>> read_outline(Record("a.json: record 1", {"instance_polygon": [[[0, 0], [4, 0], [4, 3]]]}), "instance_polygon")
    ((0.0, 0.0, 4.0, 0.0, 4.0, 3.0),)
    >>> read_outline(Record("a.json: record 1", {"segmentation": {"size": [2, 3], "counts": [1, 2, 3]}}), "segmentation")
    RunLengthMask(width=3, height=2, counts='123')
    """
    value = record.values.get(name)
    if value is None:
        return ()
    if isinstance(value, dict):
        return _mask(record, name, value) or ()
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise DataError(_problem(record, name))
    polygons = (tuple(_numbers(record, name, polygon)) for polygon in value)
    return tuple(polygon for polygon in polygons if len(polygon) >= 6)


def _mask(record: Record, name: str, value: dict[str, Any]) -> RunLengthMask:
    size, counts = value.get("size"), value.get("counts")
    is_list = isinstance(counts, list) and all(isinstance(c, int) and not isinstance(c, bool) for c in counts)
    if not isinstance(size, list) or len(size) != 2 or not (is_list or isinstance(counts, str)):
        msg = (
            f"{record.where}: field '{name}' must hold polygons, or a mask with 'size' (height, width) and 'counts' (run "
            f"lengths as text or whole numbers), not {abbreviate(value)}"
        )
        raise DataError(msg)
    try:
        if isinstance(counts, str):
            return RunLengthMask(size[1], size[0], counts)
        return RunLengthMask.from_runs(size[1], size[0], counts or [])
    except DataError as error:
        msg = f"{record.where}: field '{name}': {error}"
        raise DataError(msg) from error


def _numbers(record: Record, name: str, polygon: list[Any]) -> list[float]:
    flat = [x for point in polygon for x in (point if isinstance(point, list) else [point])]
    if len(flat) % 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9 for x in flat):
        raise DataError(_problem(record, name))
    return [float(x) for x in flat]


def _problem(record: Record, name: str) -> str:
    return (
        f"{record.where}: field '{name}' must hold polygons, lists of x and y in pixels, a mask of run lengths, or null"
    )
