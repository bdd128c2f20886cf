"""Figures of the section on representation and behavior."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.report.figures import BLUE, GREY, ORANGE, PURPLE, drawing, svg

if TYPE_CHECKING:
    import pandas as pd

    from diagnosis import Ceilings
    from probes import InformationPath

SIGNIFICANT = 0.05
_TINTS = {"lost": "#8c1c13", "made available": "#2f6b3c"}


def alignment(table: pd.DataFrame, titles: Mapping[str, str]) -> str:
    """Draw each measure by layer against its permutation baseline; filled where p with the choice of a layer is below .05."""
    measured = set(table["measure"].tolist())
    names = [name for name in titles if name in measured]
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    with drawing(6.4, 1.7 * lines + 0.3) as figure:
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
        for axes, name in zip(panels, names, strict=False):
            rows: Any = table[(table["measure"] == name) & table["value"].notna()]
            rows = rows.sort_values("image_layer")
            x, y = rows["image_layer"].to_numpy(float), rows["value"].to_numpy(float)
            base, spread = rows["baseline"].to_numpy(float), rows["baseline_sd"].to_numpy(float)
            low, high = rows["low"].to_numpy(float), rows["high"].to_numpy(float)
            if np.isfinite(base).all():
                axes.fill_between(x, base - 2 * spread, base + 2 * spread, color=GREY, alpha=0.25, lw=0)
                axes.plot(x, base, color=GREY, lw=1, ls=":")
            elif np.isfinite(low).all():
                axes.fill_between(x, low, high, color=BLUE, alpha=0.2, lw=0)
            axes.plot(x, y, color=BLUE, lw=1.4)
            certain = rows["p_choice"].to_numpy(float) <= SIGNIFICANT
            untested = np.isnan(rows["p_choice"].to_numpy(float))
            axes.plot(x[certain | untested], y[certain | untested], "o", color=BLUE, ms=4.5)
            axes.plot(x[~certain & ~untested], y[~certain & ~untested], "o", color=BLUE, ms=4.5, mfc="white")
            axes.set_title(titles[name], fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3, axis="y")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(names) - columns) : len(names)]:
            axes.set_xlabel("layer")
        return svg(figure)


def information(paths: Mapping[str, InformationPath], titles: Mapping[str, str]) -> str:
    """Draw the nats of both families along each path, one panel each, with H(Z) and the words of significant changes."""
    # The image path is long and has a whole line; two short paths share one.
    rows = [[name] * 2 for name in paths if name == "image"]
    short = [name for name in paths if name != "image"]
    rows += [[short[i], short[min(i + 1, len(short) - 1)]] for i in range(0, len(short), 2)]
    with drawing(6.4, 2.9 * len(rows) + 0.2) as figure:
        panels = figure.subplot_mosaic([[name.replace(".", " ") for name in row] for row in rows])
        for name, path in paths.items():
            axes = panels[name.replace(".", " ")]
            _draw_path(axes, path)
            axes.set_title(textwrap.fill(titles.get(name, name), 70 if name == "image" else 38), fontsize=8)
        handles, labels = next(iter(panels.values())).get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        return svg(figure)


def _draw_path(axes: Any, path: InformationPath) -> None:
    at = np.arange(len(path.sites))
    axes.axhline(path.entropy, color="black", lw=0.8, ls="--", label="H(Z)")
    axes.axhline(0, color="black", lw=0.6)
    styles = ((BLUE, "o-"), (ORANGE, "D--"), (PURPLE, "^:"))
    for m, family in enumerate(path.families):
        color, style = styles[m % len(styles)]
        axes.fill_between(at, path.low[m], path.high[m], color=color, alpha=0.18, lw=0)
        axes.plot(at, path.nats[m], style, color=color, ms=4, lw=1.4, label=f"{family} reader")
    top = max(path.entropy, float(np.nanmax(path.high)))
    bottom = min(0.0, float(np.nanmin(path.low)))
    for j, change in enumerate(path.changes):
        if change.words:
            color = _TINTS.get(change.words, "#7a5c12")
            axes.axvline(j + 0.5, color=color, lw=1, ls=":", zorder=0)
            axes.text(
                j + 0.47,
                (top + bottom) / 2,
                change.words,
                rotation=90,
                fontsize=7,
                color=color,
                ha="right",
                va="center",
            )
    axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.08 * (top - bottom))
    axes.set_xlim(-0.4, len(at) - 0.6)
    axes.set_xticks(at, [_place(site) for site in path.sites], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("nats")
    axes.grid(alpha=0.3, axis="y")


def _place(site: str) -> str:
    """Return a short name: ``vision 3``, ``projector``, ``image 2``, ``last 5``.

    >>> from experiments.report.representation_figures import _place
    >>> _place("decoder.L2.resid_post at last"), _place("projector.out at object:mean")
    ('last 2', 'projector')
    """
    place, _, tokens = site.partition(" at ")
    stack, _, rest = place.partition(".")
    if stack == "projector":
        return stack
    layer = rest.partition(".")[0].removeprefix("L")
    role = tokens.partition(":")[0]
    return f"{stack if stack == 'vision' else role} {layer}"


def ceilings(result: Ceilings) -> str:
    """Draw behavior and ceiling of each cell, with the interval of their difference around behavior."""
    cells = result.cells
    with drawing(6.4, 1.2 + 0.3 * len(cells)) as figure:
        axes = figure.add_subplot()
        at = np.arange(len(cells))
        behavior, ceiling = np.array([c.behavior for c in cells]), np.array([c.ceiling for c in cells])
        spread = np.array([[c.difference - c.low for c in cells], [c.high - c.difference for c in cells]])
        axes.hlines(at, behavior, ceiling, color=GREY, lw=2, alpha=0.5)
        axes.errorbar(
            behavior, at, xerr=np.maximum(np.nan_to_num(spread), 0), fmt="D", color=ORANGE, ms=5, capsize=2, lw=1.2,
            label="behavior: answers that are right",
        )  # fmt: skip
        axes.plot(ceiling, at, "o", color=BLUE, mfc="white", ms=7, label="ceiling: answers that probes read")
        for i, cell in enumerate(cells):
            if cell.violated:
                axes.plot([cell.behavior], [i], "o", ms=13, mfc="none", mec="black")
        axes.set_yticks(at, [f"{_short(c.concept)}, {c.condition} ({c.n})" for c in cells])
        axes.invert_yaxis()
        axes.set_xlim(min(0.45, float(min(behavior.min(), ceiling.min())) - 0.05), 1.02)
        axes.set_xlabel("share of questions")
        axes.grid(alpha=0.3, axis="x")
        axes.set_title("What is represented, and what is said")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return svg(figure)


def _short(concept: str) -> str:
    """Return level and kind, once if they are equal."""
    return " ".join(dict.fromkeys(concept.split(" ")))
