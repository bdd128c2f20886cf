"""Plot of a circuit: first layer at the bottom, heads in a row, the MLP to their right, edges between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuits.results.head_plot import write_figure
from groundscope.core.text import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from circuits.results.graph import Edge, Graph

FOR, AGAINST = "#2166ac", "#b2182b"
"""Colors of edges with positive and with negative score."""
_HEAD, _MLP, _END = "#f7f7f7", "#e8dff0", "#dfeadf"


def draw(
    graph: Graph,
    path: str | Path | None = None,
    ax: Axes | None = None,
    *,
    most: int = 200,
    title: str | None = None,
) -> Axes:
    """Draw the edges of a circuit.

    Parameters
    ----------
    graph
        The circuit; for a full graph, only the largest edges are drawn.
    path
        File to write; its suffix selects the format.
    ax
        Axes to draw into; by default those of a new figure without a window.
    most
        Largest number of edges to draw, by absolute score; the default title states an omission.
    title
        Title of the plot.
    """
    edges = graph.edges[:most]
    names = [name for name in (*graph.shape.sources, "logits") if name in _ends(edges)]
    rows = _rows(names)
    at = _places(rows)
    if ax is None:
        from matplotlib.figure import Figure

        wide = max((len(row) for row in rows), default=1)
        ax = Figure(figsize=(max(5.0, 1.05 * wide + 1.6), 1.4 + 0.95 * len(rows)), layout="constrained").subplots()
    largest = max((abs(edge.score) for edge in edges), default=1.0) or 1.0
    for edge in reversed(edges):  # the largest on top
        _arrow(ax, edge, at, abs(edge.score) / largest)
    for name, (x, y) in at.items():
        _box(ax, name, x, y)
    _finish(ax, at, rows)
    omitted = len(graph) - len(edges)
    caption = (
        title or f"{graph.model}: {format_count(len(graph), 'edge')}{f', the largest {most} drawn' if omitted else ''}"
    )
    ax.set_title(caption, fontsize=10, parse_math=False)
    figure = ax.get_figure(root=True)
    if path is not None and figure is not None:
        write_figure(figure, Path(path))
    return ax


def _ends(edges: tuple[Edge, ...]) -> set[str]:
    return {name for edge in edges for name in (edge.source, edge.reader[0])}


def _rows(names: list[str]) -> list[list[str]]:
    """Return nodes in rows: the input, each layer's heads and then its MLP, the logits."""
    rows: dict[tuple[int, int], list[str]] = {}
    for name in names:
        layer = -1 if name == "input" else 10**9 if name == "logits" else int(name[1:].partition(".")[0])
        rows.setdefault((layer, int(name.endswith(".mlp"))), []).append(name)
    return [rows[key] for key in sorted(rows)]


def _places(rows: list[list[str]]) -> dict[str, tuple[float, float]]:
    """Return the coordinates of each node; MLPs are to the right of the heads, so that long edges do not cross them."""
    wide = max((len(row) for row in rows), default=1)
    at = {}
    for y, row in enumerate(rows):
        mlp = row[0].endswith(".mlp")
        for k, name in enumerate(row):
            x = (wide - 1) / 2 + 0.35 * wide + 0.35 if mlp else k + (wide - len(row)) / 2
            # Neighbors in a row differ in height, so that an edge between rows does not cross a third node.
            at[name] = (x, y + 0.16 * (k % 2))
    return at


def _arrow(ax: Axes, edge: Edge, at: dict[str, tuple[float, float]], size: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    node, read = edge.reader
    (x0, y0), (x1, y1) = at[edge.source], at[node]
    shift = {"q": -0.22, "k": 0.0, "v": 0.22}.get(read, 0.0)
    bend = 0.0 if abs(x1 - x0) > 0.05 and y1 - y0 < 1.5 else 0.16 * np.sign(x1 - x0 or 1)
    patch = FancyArrowPatch(
        (x0, y0 + 0.17),
        (x1 + shift, y1 - 0.19),
        connectionstyle=f"arc3,rad={bend}",
        arrowstyle="-|>",
        mutation_scale=5 + 5 * size,
        linewidth=0.5 + 3.5 * size,
        color=FOR if edge.score >= 0 else AGAINST,
        alpha=0.35 + 0.55 * size,
        shrinkA=0,
        shrinkB=0,
        zorder=1 + size,
    )
    ax.add_patch(patch)
    if read:
        ax.text(x1 + shift, y1 - 0.085, read, fontsize=6, ha="center", va="center", color="0.3", zorder=6)


def _box(ax: Axes, name: str, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    color = _END if name in ("input", "logits") else _MLP if name.endswith(".mlp") else _HEAD
    box = FancyBboxPatch(
        (x - 0.31, y - 0.13),
        0.62,
        0.26,
        boxstyle="round,pad=0.03,rounding_size=0.09",
        facecolor=color,
        edgecolor="0.35",
        linewidth=0.8,
        zorder=5,
    )
    ax.add_patch(box)
    ax.text(x, y + (0.03 if ".H" in name else 0), name, ha="center", va="center", fontsize=8, zorder=6)


def _finish(ax: Axes, at: dict[str, tuple[float, float]], rows: list[list[str]]) -> None:
    from matplotlib.lines import Line2D

    if at:
        x = [place[0] for place in at.values()]
        ax.set_xlim(min(x) - 0.7, max(x) + 0.7)
    ax.set_ylim(-0.4, len(rows) - 0.7)
    ax.set_axis_off()
    handles = [
        Line2D([], [], color=color, linewidth=2, label=label)
        for color, label in ((FOR, "carries the answer"), (AGAINST, "works against it"))
    ]
    ax.legend(handles=handles, loc="lower right", fontsize=7, frameon=False)
