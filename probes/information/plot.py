"""The figure of a path: where information becomes unavailable."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.artifacts import write_bytes
from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from probes.information.results import InformationPath

COLORS = ("#33508a", "#b5482e", "#3c7a4b", "#7a5195", "#8a6d1f")
"""Color of each family, in order."""


def plot_path(result: InformationPath, *, path: str | Path | None = None, ax: Axes | None = None) -> Axes:
    """Draw the information of each family along the path, with intervals, H(Z), and the words of significant changes.

    Parameters
    ----------
    result
        The path.
    path
        File to write; its suffix selects the format.
    ax
        Axes to draw into; by default those of a new figure without a window.

    Raises
    ------
    ConfigError
        If matplotlib does not support the suffix.
    StoreError
        If the file cannot be written.
    """
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(2.5 + 0.55 * min(len(result.sites), 40), 4.4), layout="constrained").subplots()
    at = np.arange(len(result.sites))
    ax.axhline(result.entropy, color="#555555", lw=1, ls="--", label="H(Z)")
    if result.condition:
        ceiling = float(result.null_entropy.min())
        ax.axhline(ceiling, color="#555555", lw=1, ls=":", label="H(Z) left by the condition")
    ax.axhline(0, color="#999999", lw=0.8)
    for m, name in enumerate(result.families):
        color = COLORS[m % len(COLORS)]
        ax.fill_between(at, result.low[m], result.high[m], color=color, alpha=0.18, lw=0)
        style = ("o-", "s--", "^-.", "D:")[m % 4]  # families often agree, and their lines cover each other
        ax.plot(at, result.nats[m], style, color=color, ms=4, lw=1.6, label=name)
    top = max(result.entropy, float(np.nanmax(result.high)))
    bottom = min(0.0, float(np.nanmin(result.low)))
    span = (top - bottom) or 1.0
    for j, change in enumerate(result.changes):
        if change.words:
            color = {"lost": "#8c1c13", "made available": "#2f6b3c"}.get(change.words, "#8a6d1f")
            ax.axvline(j + 0.5, color=color, lw=1, ls=":", zorder=0)
            ax.text(
                j + 0.5, top + 0.06 * span, change.words, rotation=40, fontsize=8, color=color, ha="left", va="bottom",
                parse_math=False,
            )  # fmt: skip
    ax.set_xlim(-0.4, len(at) - 0.6)
    ax.set_ylim(bottom - 0.05 * span, top + 0.05 * span)
    ax.set_xticks(at, [name.replace(" at ", "\n") for name in result.sites], rotation=60, ha="right", fontsize=7)
    ax.set_ylabel("nats")
    for label in ax.get_xticklabels():
        label.set_parse_math(False)
    suffix = f" given {result.condition}" if result.condition else ""
    ax.set_title(
        f"Information about {result.concept}{suffix}", parse_math=False, loc="left", fontsize=10,
        pad=8 + 3.2 * max((len(change.words) for change in result.changes), default=0),
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, axis="y", lw=0.5)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure = ax.get_figure(root=True)
    if figure is not None and path is not None:
        target = Path(path)
        formats = figure.canvas.get_supported_filetypes()
        extension = target.suffix.removeprefix(".").lower() or "png"
        if extension not in formats:
            msg = f"{target}: unknown picture format '{extension}'; choose from {', '.join(sorted(formats))}"
            raise ConfigError(msg)
        buffer = io.BytesIO()
        figure.canvas.print_figure(buffer, format=extension, dpi=150)
        write_bytes(target, buffer.getvalue(), "figure")
    return ax
