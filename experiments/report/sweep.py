"""The page of a sweep: a small figure of each result over all jobs, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.report.figures import BLUE, GREY, drawing, svg
from experiments.report.html import figure, page, paragraph, section, table
from groundscope.core.text import format_count

_TINTS = (BLUE, "#d9730d", "#2f8f4e", "#8a4fbe", "#8a8f98", "#b23b3b")
_MARKS = "oDs^vP"
_ACROSS = 3
_MOST = 24
"""Largest number of figures per stage; the others are in the table."""


def make_sweep_report(
    folder: Path, by: Sequence[str], records: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page.

    Parameters
    ----------
    folder
        Folder of the sweep.
    by
        The options that differ between jobs: the first is the horizontal axis of every figure, the others define its lines.
    records, rows
        The jobs, and their results (`experiments.cli.sweep.collect_results`).
    """
    keys = [k for k in by if any(k in r for r in rows)]
    results = list(dict.fromkeys((r["stage"], r["measure"]) for r in rows if r["main"]))
    parts = [("jobs", "Jobs", _jobs(by, records))]
    for stage in dict.fromkeys(stage for stage, _ in results):
        measures = [m for s, m in results if s == stage][:_MOST]
        selected = [r for r in rows if r["stage"] == stage and r["measure"] in measures]
        caption = (
            f"Results of stage {stage} over {keys[0] if keys else 'the jobs'}"
            + (f", a line for each {' and '.join(keys[1:])}" if len(keys) > 1 else "")
            + ". Bars are 95 % intervals; gray is the control."
        )
        numbers = table(
            ["job", *keys, "result", "value", "low", "high", "control"],
            [[r["job"], *(r.get(k, "") for k in keys), r["measure"], *map(_number, _values(r))] for r in selected],
        )
        parts.append(
            (stage, stage, section(stage, stage, figure(multiples(selected, measures, keys), caption), numbers))
        )
    return page(
        f"groundscope sweep: {folder.name}",
        f"{format_count(len(records), 'job')} over {', '.join(by)}; {folder}/sweep.csv",
        parts,
    )


def multiples(rows: Sequence[Mapping[str, Any]], measures: Sequence[str], keys: Sequence[str]) -> str:
    """Draw a small figure of each measure, all with the same horizontal axis."""
    down = -(-len(measures) // _ACROSS)
    ticks = list(dict.fromkeys(str(r.get(keys[0], r["job"])) if keys else str(r["job"]) for r in rows))
    ticks.sort(key=_order)
    lines = list(dict.fromkeys(_line(r, keys) for r in rows))
    with drawing(3.0 * _ACROSS, 2.1 * down + 0.4) as picture:
        grid = picture.subplots(down, _ACROSS, squeeze=False).ravel()
        for axes, measure in zip(grid, measures, strict=False):
            for n, line in enumerate(lines):
                here = [r for r in rows if r["measure"] == measure and _line(r, keys) == line]
                x = [ticks.index(str(r.get(keys[0], r["job"])) if keys else str(r["job"])) for r in here]
                order = sorted(range(len(here)), key=lambda i, x=x: x[i])
                here, x = [here[i] for i in order], [x[i] for i in order]
                y = [r["value"] for r in here]
                ends = [
                    [max(0.0, r["value"] - r["low"]) if r["low"] is not None else 0.0 for r in here],
                    [max(0.0, r["high"] - r["value"]) if r["high"] is not None else 0.0 for r in here],
                ]
                style = {
                    "color": _TINTS[n % len(_TINTS)],
                    "marker": _MARKS[n % len(_MARKS)],
                    "markersize": 4,
                    "linewidth": 1,
                }
                axes.errorbar(x, y, yerr=ends, label=line, **style)
                control = [r["control"] for r in here]
                if any(c is not None for c in control):
                    axes.plot(
                        x, [float("nan") if c is None else c for c in control], color=GREY, linewidth=1, linestyle=":"
                    )
            axes.set_title(measure.replace(", ", ",\n", 1), fontsize=7)
            axes.set_xticks(range(len(ticks)), [t if len(t) < 12 else f"{t[:10]}…" for t in ticks], fontsize=7)
            axes.set_xlim(-0.5, len(ticks) - 0.5)
            axes.tick_params(axis="y", labelsize=7)
            if keys:
                axes.set_xlabel(keys[0], fontsize=7)
        for axes in grid[len(measures) :]:
            axes.set_axis_off()
        ends = [v for r in rows for v in _values(r) if v is not None]
        if ends and min(ends) >= 0 and max(ends) <= 1:
            # Rates have a common scale, so that figures can be compared.
            for axes in grid[: len(measures)]:
                axes.set_ylim(min(ends) - 0.03, max(ends) + 0.03)
        if len(lines) > 1:
            handles, labels = grid[0].get_legend_handles_labels()
            picture.legend(
                handles, labels, loc="outside lower center", ncols=min(6, len(lines)), fontsize=7, frameon=False
            )
        return svg(picture)


def _jobs(by: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            r["job"],
            *(r["options"].get(k, "") for k in by),
            r["status"],
            f"{r.get('seconds', 0):.1f}",
            r["folder"],
            r.get("error", ""),
        ]
        for r in records
    ]
    failed = sum(r["status"] != "done" for r in records)
    state = (
        f"{failed} of {format_count(len(records), 'job')} did not finish."
        if failed
        else f"All {format_count(len(records), 'job')} finished."
    )
    return section("jobs", "Jobs", paragraph(state), table(["job", *by, "status", "seconds", "folder", "error"], rows))


def _line(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{k.rpartition('.')[2]}={row.get(k, '')}" for k in keys[1:])


def _order(tick: str) -> tuple[bool, float, str]:
    try:
        return False, float(tick), tick
    except ValueError:
        return True, 0.0, tick


def _values(row: Mapping[str, Any]) -> list[float | None]:
    return [row[k] for k in ("value", "low", "high", "control")]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
