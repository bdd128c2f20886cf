"""Figures of the report, drawn with matplotlib as SVG elements."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

BLUE, ORANGE, GREY, GREEN, PURPLE = "#2563a8", "#d9730d", "#8a8f98", "#2f8f4e", "#7b4fa3"
"""Model, correction, control, truth, exportable correction; markers and order distinguish them without color."""
MARKERS = {
    "before": "o",
    "after": "D",
    "exportable": "h",
    "control": "s",
    "twin": "^",
    "shuffled": "x",
    "moved": "v",
    "derived": "P",
}
TINTS = {
    "before": BLUE,
    "after": ORANGE,
    "exportable": PURPLE,
    "control": GREY,
    "twin": GREEN,
    "shuffled": GREY,
    "moved": GREY,
    "derived": GREY,
}
PART_STYLES = {"lean": (GREY, "s"), "form": (PURPLE, "^"), "knowledge": (ORANGE, "D"), "image": (GREEN, "o")}
"""Color and marker of the parts of the input."""

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "text.parse_math": False,  # no TeX in labels
    "svg.hashsalt": "groundscope",
    "font.family": "sans-serif",
}


@dataclass(frozen=True)
class Point:
    """A rate with its interval."""

    value: float
    low: float
    high: float
    n: int = 0


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Create a figure in the style of the report; width and height in inches."""
    with rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element without the XML head."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def rates(series: Mapping[str, Mapping[str, Point]], labels: Mapping[str, str], title: str, *, low: float = 0.0) -> str:
    """Draw rates with intervals, one row for each measure and one marker for each series.

    Parameters
    ----------
    series
        Name of the series (a key of `MARKERS`) to measure to rate.
    labels
        Name of the series to its label in the legend.
    title
        Title of the figure.
    low
        Lower end of the axis of rates.
    """
    measures = list(next(iter(series.values())))
    with drawing(6.4, 0.9 + 0.42 * len(measures)) as figure:
        axes = figure.add_subplot()
        offsets = np.linspace(-0.26, 0.26, len(series)) if len(series) > 1 else [0.0]
        for offset, (name, points) in zip(offsets, series.items(), strict=True):
            rows = [(i, points[m]) for i, m in enumerate(measures) if m in points]
            x = [p.value for _, p in rows]
            spread = [[p.value - p.low for _, p in rows], [p.high - p.value for _, p in rows]]
            axes.errorbar(
                x,
                [i + offset for i, _ in rows],
                xerr=np.maximum(spread, 0),
                fmt=MARKERS.get(name, "o"),
                color=TINTS.get(name, BLUE),
                label=labels.get(name, name),
                markersize=5,
                capsize=2,
                linewidth=1.2,
            )
        axes.set_yticks(range(len(measures)), measures)
        axes.invert_yaxis()
        axes.set_xlim(
            low - 0.01, 1.01 if low or any(p.value > 0.6 for s in series.values() for p in s.values()) else None
        )
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(title)
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=len(series) if len(series) < 4 else 2, frameon=False)
        return svg(figure)


def shares(lines: Mapping[str, Sequence[Point]], rows: Sequence[str], title: str) -> str:
    """Draw the shares of the parts in `PART_STYLES`, one row for each kind of answer.

    Parameters
    ----------
    lines
        Name of the part to its share in every row.
    rows
        Names of the rows.
    title
        Title of the figure.
    """
    with drawing(6.4, 1.1 + 0.45 * len(rows)) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color="black", lw=0.8)
        offsets = np.linspace(-0.25, 0.25, len(lines))
        for (name, points), offset in zip(lines.items(), offsets, strict=True):
            tint, mark = PART_STYLES[name]
            x, at = [p.value for p in points], np.arange(len(rows)) + offset
            spread = np.nan_to_num([[p.value - p.low for p in points], [p.high - p.value for p in points]])
            axes.barh(at, x, height=0.22, color=tint, alpha=0.3)
            axes.errorbar(x, at, xerr=spread, fmt=mark, color=tint, label=name, markersize=5, capsize=2, linewidth=1.2)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("log-odds")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=len(lines), frameon=False)
        return svg(figure)


def grids(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], width: int = 2) -> str:
    """Draw probe accuracy by layer and head next to its control, on one scale.

    Parameters
    ----------
    rows
        Title, accuracy ``[L, H]``, control ``[L, H]``.
    width
        Panels per row.
    """
    with drawing(6.4, 2.3 * len(rows) + 0.4) as figure:
        panels = figure.subplots(len(rows), width, squeeze=False)
        image: Any = None
        for (title, accuracy, control), line in zip(rows, panels, strict=True):
            for axes, values, name in zip(line, (accuracy, control), (title, "labels shuffled"), strict=True):
                image = axes.imshow(values, vmin=0.5, vmax=1.0, cmap="viridis", origin="lower", aspect="auto")
                axes.set_title(name)
                axes.set_xlabel("head")
                axes.set_ylabel("layer")
                axes.set_xticks(range(values.shape[1]))
                axes.set_yticks(range(values.shape[0]))
                for spine in axes.spines.values():
                    spine.set_visible(False)
        figure.colorbar(image, ax=panels, shrink=0.8, label="balanced accuracy (chance .5)")
        return svg(figure)


def effects(panels: Sequence[tuple[str, np.ndarray]], marked: Sequence[tuple[int, int]]) -> str:
    """Draw patching effects by layer and head, one panel for each kind of pair, with frames around marked heads."""
    limit = max(0.05, *(float(np.abs(v).max()) for _, v in panels))
    with drawing(max(6.4, 2.1 * len(panels)), 2.6) as figure:
        line = figure.subplots(1, len(panels), squeeze=False)[0]
        image: Any = None
        for axes, (title, values) in zip(line, panels, strict=True):
            image = axes.imshow(values, vmin=-limit, vmax=limit, cmap="RdBu_r", origin="lower", aspect="auto")
            axes.set_title(title)
            axes.set_xlabel("head")
            axes.set_xticks(range(values.shape[1]))
            axes.set_yticks(range(values.shape[0]))
            for layer, head in marked:
                axes.plot(head, layer, marker="s", markersize=11, markerfacecolor="none", markeredgecolor="black")
            for spine in axes.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(line), shrink=0.8, label="share of the answer restored")
        return svg(figure)


def path(
    lines: Mapping[str, Sequence[tuple[str, float, float, float]]], control: Mapping[str, float], title: str
) -> str:
    """Draw probe accuracy along the forward pass: vision tower, projector, decoder.

    Parameters
    ----------
    lines
        Name of the line to points ``(place, value, low, high)``; places are shared and in order.
    control
        Place to the mean accuracy on shuffled labels.
    title
        Title of the figure.
    """
    places = list(dict.fromkeys(p for points in lines.values() for p, *_ in points))
    places = sorted(places, key=_stage)
    with drawing(6.4, 3.0) as figure:
        axes = figure.add_subplot()
        for (name, points), style in zip(lines.items(), ("o-", "D--", "^:", "s-."), strict=False):
            ordered = sorted(points, key=lambda p: places.index(p[0]))
            x = [places.index(p) for p, *_ in ordered]
            axes.plot(x, [v for _, v, *_ in ordered], style, label=name, markersize=4)
            axes.fill_between(x, [p[2] for p in ordered], [p[3] for p in ordered], alpha=0.15)
        controlled = [p for p in places if p in control]
        axes.plot(
            [places.index(p) for p in controlled],
            [control[p] for p in controlled],
            color=GREY,
            lw=1,
            label="labels shuffled",
        )
        axes.axhline(0.5, color="black", lw=0.6, ls=":")
        axes.set_xticks(range(len(places)), places, rotation=60, ha="right")
        axes.set_ylim(0.4, 1.02)
        axes.set_ylabel("balanced accuracy")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)
        return svg(figure)


def tradeoff(
    curves: Mapping[str, Sequence[Mapping[str, float]]], chosen: tuple[str, float], most: float, title: str
) -> str:
    """Draw errors against cost, one line for each method or control with a point for each strength.

    Parameters
    ----------
    curves
        Name (``control: …`` for a control) to rows with ``strength``, ``harm`` and ``cost``, strength 0 first.
    chosen
        Name and strength to mark.
    most
        Largest allowed cost.
    title
        Title of the figure.
    """
    tints = (BLUE, GREEN, "#7b4fa3", "#a3554f", "#3d8a8a")
    with drawing(6.4, 4.0) as figure:
        axes = figure.add_subplot()
        methods = [name for name in curves if not name.startswith("control:") and name != chosen[0]]
        for name, rows in curves.items():
            x, y = [100 * max(0.0, r["cost"]) for r in rows], [100 * r["harm"] for r in rows]
            if name == chosen[0]:
                style: dict[str, Any] = {"color": ORANGE, "marker": "D", "lw": 2.2, "zorder": 4}
            elif name in methods:
                place = methods.index(name)
                style = {"color": tints[place % len(tints)], "marker": "o^sPv"[place % 5], "lw": 1.4}
            else:
                place = [n for n in curves if n.startswith("control:")].index(name)
                style = {"color": GREY, "marker": "sxv+"[place % 4], "lw": 1, "ls": (":", "--", "-.", "-")[place % 4]}
            axes.plot(x, y, label=name, markersize=4, **style)
            if name == chosen[0]:
                for row, at, up in zip(rows, x, y, strict=True):
                    axes.annotate(f"{row['strength']:g}", (at, up), (4, 5), textcoords="offset points", fontsize=7)
                    if row["strength"] == chosen[1]:
                        axes.plot([at], [up], "o", ms=13, mfc="none", mec="black", zorder=5)
        axes.axvline(100 * most, color="black", lw=0.8, ls=":")
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=-0.05)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("cost: loss of accuracy on neutral or typical questions, percentage points")
        axes.set_ylabel("errors by prior, %")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return svg(figure)


def _stage(place: str) -> tuple[int, int]:
    stack, _, number = place.partition(" ")
    return ("vision", "projector", "decoder").index(stack), int(number or 0)


def margins(lines: Mapping[str, Sequence[float]], places: Sequence[str], title: str) -> str:
    """Plot the margins of probes for one image, by place along the forward pass; above 0 the probe predicts the concept."""
    with drawing(6.4, 2.8) as figure:
        axes = figure.add_subplot()
        tints = (GREEN, ORANGE, BLUE)
        for (name, values), tint, style in zip(lines.items(), tints, ("o-", "D--", "s:"), strict=False):
            axes.plot(range(len(values)), values, style, color=tint, label=name, markersize=4)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(places)), places, rotation=60, ha="right")
        axes.set_ylabel("probe margin")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)
        return svg(figure)


def way(places: Sequence[tuple[str, float, str]], title: str, above: str, below: str) -> str:
    """Draw the log-odds of the truth along the forward pass of one image; crosses mark unreadable places.

    Parameters
    ----------
    places
        Name, log-odds and state (``truth``, ``other``, ``unclear``, ``unreadable``), in the order of the forward pass.
    title
        Title of the figure.
    above, below
        Labels of places above and below 0.
    """
    tints = {"truth": GREEN, "other": ORANGE, "unclear": GREY, "unreadable": GREY}
    marks = {"truth": "o", "other": "D", "unclear": "s", "unreadable": "x"}
    with drawing(6.4, 2.9) as figure:
        axes = figure.add_subplot()
        values = [0.0 if np.isnan(v) else float(np.clip(v, -8, 8)) for _, v, _ in places]
        stages = [name.split(" ")[0] for name, _, _ in places]
        for stage in dict.fromkeys(stages):
            x = [i for i, s in enumerate(stages) if s == stage and places[i][2] != "unreadable"]
            axes.plot(x, [values[i] for i in x], color=GREY, lw=0.8, zorder=1)
        for state in (state for state in marks if any(s == state for _, _, s in places)):
            x = [i for i, (_, _, s) in enumerate(places) if s == state]
            label = {"truth": above, "other": below}.get(state, state)
            axes.scatter(x, [values[i] for i in x], c=tints[state], marker=marks[state], s=26, zorder=2, label=label)
        axes.axhline(0, color="black", lw=0.8)
        limit = max(2.0, *(abs(v) for v in values)) * 1.1
        axes.set_ylim(-limit, limit)
        axes.set_xticks(range(len(places)), [name for name, _, _ in places], rotation=60, ha="right", fontsize=7)
        axes.set_ylabel("log-odds of the truth")
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure)


def overlay(
    image: Image.Image,
    size: tuple[int, int],
    maps: Sequence[tuple[str, np.ndarray, float]],
    box: tuple[float, float, float, float] | None,
) -> str:
    """Draw the attention of several heads over an image.

    Parameters
    ----------
    image
        The image, or a smaller copy.
    size
        Width and height that `box` refers to, in pixels.
    maps
        For each head its title, attention ``[rows, columns]``, and the share of its attention on the image.
    box
        Left, top, right and bottom of a frame.
    """
    with drawing(6.4, 1.9) as figure:
        line = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
        pixels = np.asarray(image)
        width, height = size
        for axes in line:
            axes.imshow(pixels, extent=(0, width, height, 0))
            axes.axis("off")
        line[0].set_title("image", fontsize=8)
        for axes, (title, values, mass) in zip(line[1:], maps, strict=True):
            scaled = values / max(float(values.max()), 1e-9)
            axes.imshow(scaled, extent=(0, width, height, 0), cmap="magma", alpha=0.65, vmin=0, vmax=1)
            axes.set_title(f"{title}\n{mass:.0%} on image", fontsize=8)
            if box is not None:
                x0, y0, x1, y1 = box
                axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="white", lw=1)
        return svg(figure)


def overlays(panels: Sequence[tuple[Image.Image, np.ndarray, str]]) -> str:
    """Draw the attention of one head over several images: image, map ``[rows, columns]`` and title of each."""
    with drawing(6.4, 2.9) as figure:
        line = figure.subplots(1, max(3, len(panels)), squeeze=False)[0]
        for axes in line:
            axes.axis("off")
        for axes, (image, values, title) in zip(line, panels, strict=False):
            pixels = np.asarray(image)
            extent = (0, pixels.shape[1], pixels.shape[0], 0)
            axes.imshow(pixels, extent=extent)
            axes.imshow(values / max(float(values.max()), 1e-9), extent=extent, cmap="magma", alpha=0.6, vmin=0, vmax=1)
            axes.set_title(
                "\n".join(textwrap.fill(part, 30) for part in title.splitlines()), fontsize=8, weight="normal"
            )
        return svg(figure)
