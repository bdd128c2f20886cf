"""Plots of head scores."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.artifacts import write_bytes
from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def heatmap(
    values: np.ndarray,
    *,
    title: str,
    label: str,
    marked: np.ndarray | None = None,
    path: str | Path | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw scores ``[n_layers, n_heads]`` with a color scale centered at 0, the first layer at the bottom.

    Parameters
    ----------
    values
        Scores to draw.
    title, label
        Title of the plot, and label of its color bar.
    marked
        Heads to mark with a dot, bool of the same shape.
    path
        File to write; its suffix selects the format.
    ax
        Axes to draw into; by default those of a new figure without a window.
    """
    if ax is None:
        from matplotlib.figure import Figure

        size = (2.2 + 0.32 * min(values.shape[1], 40), 1.6 + 0.32 * min(values.shape[0], 40))
        ax = Figure(figsize=size, layout="constrained").subplots()
    largest = float(np.nanmax(np.abs(values))) or 1.0
    image = ax.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, origin="lower", aspect="auto")
    if marked is not None and marked.any():
        rows, columns = np.nonzero(marked)
        ax.plot(columns, rows, "o", markersize=3.5, markerfacecolor="white", markeredgecolor="black", linestyle="none")
    for axis, count in ((ax.xaxis, values.shape[1]), (ax.yaxis, values.shape[0])):
        axis.set_ticks(range(0, count, max(1, count // 16)))
    ax.set(xlabel="head", ylabel="layer")
    ax.set_title(title, parse_math=False)
    figure = ax.get_figure(root=True)
    if figure is not None:
        figure.colorbar(image, ax=ax).set_label(label, parse_math=False)
        if path is not None:
            write_figure(figure, Path(path))
    return ax


def write_figure(figure: Figure | SubFigure, path: Path) -> None:
    """Write a figure in the format of the file's suffix, atomically: on failure the old file remains.

    Raises
    ------
    ConfigError
        If matplotlib does not support the suffix.
    StoreError
        If the file cannot be written.
    """
    formats = figure.canvas.get_supported_filetypes()
    extension = path.suffix.removeprefix(".").lower() or "png"
    if extension not in formats:
        msg = f"{path}: unknown picture format '{extension}'; choose from {', '.join(sorted(formats))}"
        raise ConfigError(msg)
    buffer = io.BytesIO()
    figure.canvas.print_figure(buffer, format=extension, dpi=150)
    write_bytes(path, buffer.getvalue(), "figure")
