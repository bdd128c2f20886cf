"""Labels of users in the columns of a table: yes or no, one of several classes, or a number."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from concepts.concept import LEVELS, Concept
from concepts.label_names import is_label_name
from concepts.reading.tables import NOT_AVAILABLE
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_count, nearest

MOST_CLASSES = 100
"""Largest number of different texts in a label column."""
TRUTH = {"yes": True, "no": False, "true": True, "false": False}
"""Words of a yes-no column, in any case."""
Kind = Literal["truth", "number", "text"]
Label = bool | float


def parse_labels(
    columns: Mapping[str, Sequence[Any]], rows: Sequence[str], classes: Collection[str] = ()
) -> dict[str, list[Label | None]]:
    """Return the labels of every concept in label columns, one value for each row, None where undefined.

    Parameters
    ----------
    columns
        Cells by column. ``concept:value`` holds yes or no (also true, false, 1, 0). A column with another name holds yes or no
        for one concept; texts, which become one concept ``column:text`` each; or numbers. Cells that are None, NaN or empty
        are undefined; a column without any other cell gives no concept.
    rows
        Name of each row in messages, such as ``labels.csv: line 3``.
    classes
        Columns whose numbers are names of classes, not amounts.

    Raises
    ------
    DataError
        Names the row and column: for a column that mixes types, or numbers that are not finite; for more than `MOST_CLASSES`
        classes; and if two columns define the same concept.
    ConfigError
        For an unknown column in `classes`.

    Examples
    --------
    >>> from concepts.reading.label_columns import parse_labels
    >>> columns = {"blurred": ["yes", "no", ""], "scene": ["street", None, "room"], "size": [0.5, 2, 1]}
    >>> for concept, values in parse_labels(columns, ["row 1", "row 2", "row 3"]).items():
    ...     print(concept, values)
    blurred [True, False, None]
    scene:room [False, None, True]
    scene:street [True, None, False]
    size [0.5, 2.0, 1.0]
    """
    unknown = next((name for name in classes if name not in columns), None)
    if unknown is not None:
        msg = f"classes: unknown label column '{unknown}'; choose from {', '.join(columns)}{nearest(unknown, columns)}"
        raise ConfigError(msg)
    labels: dict[str, list[Label | None]] = {}
    for name, cells in columns.items():
        for concept, values in _column(name, [_plain(c) for c in cells], rows, as_classes=name in classes).items():
            if concept in labels:
                msg = f"two label columns define the concept '{concept}'; rename or remove one of them"
                raise DataError(msg)
            labels[concept] = values
    return labels


def label_names(columns: Collection[str]) -> list[str]:
    """Return the columns that hold labels: all that are no field of an example; raises `DataError` for a level without a name."""
    names = [name for name in columns if is_label_name(name)]
    for name in names:
        Concept.parse(name)
    return names


def _column(name: str, cells: list[Any], rows: Sequence[str], *, as_classes: bool) -> dict[str, list[Label | None]]:
    first: dict[Kind, int] = {}
    for i, cell in enumerate(cells):
        if cell is not None:
            first.setdefault(_kind(cell, name, rows[i]), i)
    if not first:
        return {}
    undecided = [i for i, c in enumerate(cells) if c is not None and not _is_truth(c) and _number(c) not in {0.0, 1.0}]
    if ":" in name:
        if undecided or len(first) > 1:
            wrong = undecided[0] if undecided else max(first.values())
            msg = f"{rows[wrong]}: column '{name}' holds {_show(cells[wrong])}; a label column concept:value holds yes or no"
            raise DataError(msg)
        return {name: [None if c is None else _truth(c) for c in cells]}
    if "number" in first and len(first) > 1:
        a, b = sorted((first["number"], min(i for kind, i in first.items() if kind != "number")))
        earlier = rows[a].rpartition(": ")[2]
        msg = (
            f"{rows[b]}: column '{name}' holds {_show(cells[b])}, but {earlier} holds {_show(cells[a])}; a label column holds "
            "only yes and no, only numbers, or only text; leave cells without a label empty"
        )
        raise DataError(msg)
    if "number" in first and not as_classes:
        return {name: [None if c is None else float(c) if undecided else _truth(c) for c in cells]}
    if set(first) == {"truth"} and not as_classes:
        return {name: [None if c is None else _truth(c) for c in cells]}
    return _classes(name, [None if c is None else _text(c) for c in cells])


def _classes(name: str, texts: list[str | None]) -> dict[str, list[Label | None]]:
    values = sorted({t for t in texts if t is not None})
    if len(values) > MOST_CLASSES:
        msg = (
            f"column '{name}' holds {format_count(len(values), 'different text')}, and a label column at most "
            f"{MOST_CLASSES} classes; if it is no label, leave it out with ignore=['{name}']"
        )
        raise DataError(msg)
    if name in LEVELS and any(":" in value for value in values):
        msg = f"column '{name}' holds the text '{next(v for v in values if ':' in v)}'; rename the column"
        raise DataError(msg)
    return {f"{name}:{value}": [None if t is None else t == value for t in texts] for value in values}


def _plain(cell: Any) -> Any:
    """Return a cell as a Python value, None if it is undefined; text without spaces around it."""
    value = (
        cell.item() if hasattr(cell, "item") and not isinstance(cell, str) and not getattr(cell, "shape", ()) else cell
    )
    if isinstance(value, str):
        text = str(value).strip()
        return None if text in NOT_AVAILABLE else text
    if (
        value is None
        or type(value).__name__ in {"NAType", "NaTType"}
        or (isinstance(value, float) and math.isnan(value))
    ):
        return None
    return value


def _kind(cell: Any, name: str, row: str) -> Kind:
    if _is_truth(cell):
        return "truth"
    number = _number(cell)
    if number is not None:
        if not math.isfinite(number):
            msg = (
                f"{row}: column '{name}' holds {_show(cell)}; a number must be finite, and a cell without a label empty"
            )
            raise DataError(msg)
        return "number"
    if isinstance(cell, str):
        return "text"
    msg = f"{row}: column '{name}' holds a {type(cell).__name__}; a label is yes or no, a number or text"
    raise DataError(msg)


def _is_truth(cell: Any) -> bool:
    return isinstance(cell, bool) or (isinstance(cell, str) and cell.lower() in TRUTH)


def _number(cell: Any) -> float | None:
    if isinstance(cell, bool):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def _truth(cell: Any) -> bool:
    return TRUTH[cell.lower()] if isinstance(cell, str) and cell.lower() in TRUTH else bool(float(cell))


def _text(cell: Any) -> str:
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _show(cell: Any) -> str:
    text = f"'{cell}'" if isinstance(cell, str) else str(cell)
    return text if len(text) <= 60 else f"{text[:57]}…"
