"""Where concepts can be decoded: accuracy of probes by head, and along the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from concepts.concept import LEVELS, Concept
from experiments.report import figures
from experiments.report.derived import accuracy_by_place, level_accuracy
from experiments.report.html import closed, figure, interval, paragraph, percent, section, table
from experiments.results.run_files import RunFiles
from groundscope.core.text import format_count
from probes import Cell, GridPlan, ProbeGrid


def probes_section(run: RunFiles) -> str:
    """Return the section; empty if no probe was fitted."""
    parts = [
        paragraph(
            "Logistic probes, fitted on one part of the images and evaluated once on the other; questions about one image are "
            "never in both. The control repeats the procedure with shuffled labels."
        )
    ]
    rows = []
    for level in LEVELS:
        accuracy = level_accuracy(run, "decoder", "z", "last", level)
        if accuracy is not None:
            values, controls, names = accuracy
            rows.append((f"{level} ({format_count(len(names), 'concept')})", values, controls))
    if rows:
        parts.append(
            figure(
                figures.grids(rows),
                "Balanced accuracy of probes on the output of each head at the last token, averaged over the concepts of a "
                "level. Right: the same with shuffled labels.",
            )
        )
    for tokens, name in (("object:mean", "the object's image tokens"), ("last", "the last token")):
        lines, control = {}, {}
        for level in LEVELS:
            places = accuracy_by_place(run, level, tokens)
            if places:
                lines[level] = [(p.place, p.value, p.low, p.high) for p in places]
                control |= {p.place: p.control for p in places}
        if lines:
            parts.append(
                figure(
                    figures.path(lines, control, f"Probes at {name}"),
                    f"Balanced accuracy of probes at {name}, from the vision tower through the projector to the decoder.",
                )
            )
    parts += _own_labels(run)
    return section("known", "Where it is known", *parts, stages=("trace", "probe")) if len(parts) > 1 else ""


MAX_OWN = 12
"""Labels of the user that the section shows; the others are in a closed part."""


@dataclass(frozen=True)
class _Score:
    value: float
    low: float
    high: float


def _own_labels(run: RunFiles) -> list[str]:
    """Return a table of the user's own labels: where each can be decoded best, in the order of the labels."""
    best: dict[str, tuple[Cell, ProbeGrid]] = {}
    for grid in run.grids.values():
        for concept in grid.concepts:
            if Concept.parse(concept).level:
                continue
            cell = grid.best(concept)
            if concept not in best or cell.validation > best[concept][0].validation:
                best[concept] = cell, grid
    if not best:
        return []
    rows = [_row(concept, cell, grid) for concept, (cell, grid) in best.items()]
    rows += _class_rows(run)
    head = ("label", "place", "score on held-out images", "shuffled labels", "examples")
    note = paragraph(
        "Your own labels, each at the layer or head that is best in cross-validation: balanced accuracy (chance 50 %), or R2 of "
        "ridge regression for numbers (the mean predicts with R2 0). A label with several texts has a probe for each, against "
        "the rest, and one softmax probe among all.",
        soft=True,
    )
    more = (
        [closed("own-labels", f"{len(rows) - MAX_OWN} more labels", table(head, rows[MAX_OWN:]))]
        if len(rows) > MAX_OWN
        else []
    )
    return [note, table(head, rows[:MAX_OWN]), *more]


def _row(concept: str, cell: Cell, grid: ProbeGrid) -> tuple[object, ...]:
    place = f"{grid.site(cell.layer)}{'' if cell.head is None else f', head {cell.head}'} at {grid.tokens}"
    n = int(grid.n_test[grid.concepts.index(concept)])
    if concept in grid.numbers:
        control = "" if np.isnan(cell.control) else f"{cell.control:.2f}"
        return concept, place, f"R2 {cell.r2:.2f} [{cell.r2_low:.2f}, {cell.r2_high:.2f}]", control, n
    control = "" if np.isnan(cell.control) else percent(cell.control)
    return concept, place, interval(_Score(cell.balanced_accuracy, cell.low, cell.high)), control, n


def _class_rows(run: RunFiles) -> list[tuple[object, ...]]:
    """Return a row for each label with classes: the softmax probe where the probes of the classes are best in validation."""
    rows: dict[str, tuple[float, tuple[object, ...]]] = {}
    grids = {GridPlan(*key, ()).name: grid for key, grid in run.grids.items()}
    for record in run.class_scores:
        grid, column, layer = grids.get(record["grid"]), record["column"], record.get("layer")
        if grid is None or layer not in grid.layers:
            continue
        classes = [c for c in grid.concepts if c.startswith(f"{column}:")]
        validation = float(np.mean([grid.array(c, "validation")[grid.layers.index(layer)] for c in classes]))
        if column not in rows or validation > rows[column][0]:
            score = interval(_Score(record["balanced_accuracy"], record["low"], record["high"]))
            name = f"{column} ({len(classes)} classes, softmax)"
            chance = f"chance {percent(record['chance'])}"
            rows[column] = validation, (name, f"{grid.site(layer)} at {grid.tokens}", score, chance, record["n"])
    return [row for _, row in rows.values()]
