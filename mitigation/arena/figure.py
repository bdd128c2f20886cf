"""The Pareto figure of an arena: errors against cost, and errors against recall."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mitigation.arena.measures import CAPTION_INVENTED, CAPTION_RECALL
from mitigation.arena.result import ArenaResult, RowResult
from mitigation.arena.tables import label, ordered
from mitigation.strength import PRIOR_ERRORS, RECALL_COST

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def errors_of(row: RowResult) -> float:
    """Return the mean of a row's errors by prior; the share of wrong answers without such questions."""
    values = [m.value.value for name in PRIOR_ERRORS if (m := row.measure(name)) is not None]
    if values:
        return sum(values) / len(values)
    right = row.measure("all: right")
    return math.nan if right is None else 1 - right.value.value


def front(points: list[tuple[float, float]]) -> list[int]:
    """Return the indices of points (smaller is better in both) that no other point is at least as good as, by the first value.

    Examples
    --------
    >>> from mitigation.arena.figure import front
    >>> front([(1.0, 3.0), (2.0, 2.0), (2.0, 4.0), (3.0, 1.0)])
    [0, 1, 3]
    """
    indices = []
    for i, (x, y) in enumerate(points):
        dominated = any(a <= x and b <= y and (a < x or b < y) for j, (a, b) in enumerate(points) if j != i)
        if not dominated and not (math.isnan(x) or math.isnan(y)):
            indices.append(i)
    return sorted(indices, key=lambda i: points[i])


def pareto_figure(arena: ArenaResult, regime: str = "greedy") -> Figure:
    """Return a figure with one panel for each trade-off that was measured; rows on the front are joined by a line."""
    from matplotlib.figure import Figure as NewFigure

    rows = [row for row in ordered(arena, regime) if row.problem is None]
    panels: list[tuple[str, str, list[tuple[float, float]]]] = []
    if any(row.price is not None for row in rows):
        costs = [math.nan if r.price is None else r.price.token_ratio for r in rows]
        panels.append(("time of a token, times the model alone", "errors by prior, %", _pairs(costs, rows)))
    denied = [r.measure(RECALL_COST) for r in rows]
    if any(m is not None for m in denied):
        losses = [math.nan if m is None else 100 * m.value.value for m in denied]
        panels.append(("present objects denied, %", "errors by prior, %", _pairs(losses, rows)))
    named = [(r.measure(CAPTION_RECALL), r.measure(CAPTION_INVENTED)) for r in rows]
    if any(a is not None and b is not None for a, b in named):
        points = [
            (math.nan, math.nan) if a is None or b is None else (100 * (1 - a.value.value), 100 * b.value.value)
            for a, b in named
        ]
        panels.append(("objects that captions leave out, %", "CHAIR_i, %", points))
    figure = NewFigure(figsize=(5.2 * max(len(panels), 1), 4.4), layout="constrained")
    for number, (x, y, points) in enumerate(panels, 1):
        _draw(figure.add_subplot(1, len(panels), number), x, y, points, rows)
    return figure


def _pairs(values: list[float], rows: list[RowResult]) -> list[tuple[float, float]]:
    return [(value, 100 * errors_of(row)) for value, row in zip(values, rows, strict=True)]


def _draw(axes: Any, x: str, y: str, points: list[tuple[float, float]], rows: list[RowResult]) -> None:
    best = front(points)
    axes.plot(*zip(*(points[i] for i in best), strict=True), color="0.6", linewidth=1, zorder=1) if best else None
    for i, (point, row) in enumerate(zip(points, rows, strict=True)):
        color = "#444444" if i == 0 else "#999999" if row.control else "#2a6fbb"
        axes.scatter(*point, s=26, color=color, marker="s" if i == 0 or row.control else "o", zorder=2)
        if i in best or i == 0:
            axes.annotate(label(row), point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
