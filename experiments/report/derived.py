"""Numbers that several sections of the report compute from the files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concepts.scenes.distributions import COLOR_NAMES, TYPICAL
from concepts.schema import Example
from experiments.results.run_files import RunFiles
from experiments.results.selection import prior_errors
from probes import ProbeGrid


@dataclass(frozen=True)
class PlaceAccuracy:
    """Accuracy of probes at one place: means over the concepts of a level."""

    place: str
    """``layer 4``, ``vision 2``, ``projector``."""
    value: float
    """Balanced accuracy on held-out images."""
    low: float
    high: float
    control: float
    """The same with shuffled labels; NaN if no concept has this control."""


@dataclass(frozen=True)
class ColorReading:
    """How often probes read the true and the prior's color at one place, over all errors by prior."""

    place: str
    tokens: str
    true: float
    """Share of the errors in which the true color has the largest margin."""
    prior: float
    """Share of the errors in which the typical color has the largest margin."""
    n: int
    """Number of errors."""


@dataclass(frozen=True)
class ColorMargins:
    """Margins of the color probes at one place."""

    place: str
    tokens: str
    margins: np.ndarray
    """Float ``[n, colors]``."""
    colors: tuple[str, ...]


def mean_defined(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over the first axis without NaN; NaN if all values are NaN."""
    table = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(table)
    count = defined.sum(axis=0)
    return np.where(count > 0, np.where(defined, table, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def concepts_of(grid: ProbeGrid, level: str) -> list[str]:
    """Return the concepts of a level; ``named``, whether the image has what the question names, counts for objects only."""
    return [c for c in grid.concepts if c.startswith(f"{level}:") and (level == "object" or not c.endswith(":named"))]


def level_accuracy(
    run: RunFiles, stack: str, component: str, tokens: str, level: str
) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """Return mean accuracy and control ``[L]`` or ``[L, H]`` of a level, and its concepts; None if none was probed."""
    grid = run.grids.get((stack, component, tokens))
    names = concepts_of(grid, level) if grid is not None else []
    if grid is None or not names:
        return None
    accuracy = np.mean([grid.array(c) for c in names], axis=0)
    return accuracy, mean_defined([grid.array(c, "control") for c in names]), names


def best_layer(run: RunFiles, level: str, tokens: str) -> PlaceAccuracy | None:
    """Return held-out accuracy at the decoder layer that is best in validation; None if the level was not probed."""
    accuracy = level_accuracy(run, "decoder", "resid_post", tokens, level)
    if accuracy is None:
        return None
    values, controls, names = accuracy
    grid = run.grids["decoder", "resid_post", tokens]
    at = int(np.mean([grid.array(c, "validation") for c in names], axis=0).argmax())
    low, high = (float(np.mean([grid.array(c, end)[at] for c in names])) for end in ("low", "high"))
    return PlaceAccuracy(f"layer {grid.layers[at]}", float(values[at]), low, high, float(controls[at]))


def accuracy_by_place(run: RunFiles, level: str, tokens: str) -> list[PlaceAccuracy]:
    """Return the accuracy of a level at each layer of vision tower, projector and decoder."""
    points = []
    for stack, component in (("vision", "resid_post"), ("projector", "out"), ("decoder", "resid_post")):
        grid = run.grids.get((stack, component, tokens))
        names = concepts_of(grid, level) if grid is not None else []
        if grid is None or not names:
            continue
        for i, layer in enumerate(grid.layers):
            values = [
                float(mean_defined([grid.array(c, s)[i] for c in names]))
                for s in ("balanced_accuracy", "low", "high", "control")
            ]
            points.append(PlaceAccuracy(stack if stack == "projector" else f"{stack} {layer}", *values))
    return points


def errors_by_prior(run: RunFiles) -> list[tuple[int, Example]]:
    """Return row and example of each wrong answer that follows the prior; empty without activations."""
    if run.frame is None:
        return []
    ids = run.frame["id"].tolist()
    return [(row, run.examples[ids[row]]) for row in prior_errors(run.frame, run.examples)]


def color_readings(run: RunFiles) -> list[ColorReading]:
    """Return for each place how often probes, fitted on neutral scenes, read the true color in errors by prior."""
    errors = errors_by_prior(run)
    if not errors:
        return []
    things = [example.named_object() for _, example in errors]
    true = np.array([t.attributes["color"] if t else "" for t in things])
    prior = np.array([TYPICAL[t.noun][0] if t else "" for t in things])
    readings = []
    for reading in color_margins(run, np.array([row for row, _ in errors])):
        best = np.array(reading.colors)[reading.margins.argmax(1)]
        shares = float(np.mean(best == true)), float(np.mean(best == prior))
        readings.append(ColorReading(reading.place, reading.tokens, *shares, len(errors)))
    return readings


def color_margins(run: RunFiles, rows: np.ndarray) -> list[ColorMargins]:
    """Return the margins of the color probes for some rows of the store, in the order of the forward pass.

    Only places where every color was probed; none without activations.
    """
    store = run.store
    if store is None:
        return []
    readings = []
    for (stack, component, tokens), grid in run.grids.items():
        colors = tuple(c for c in COLOR_NAMES if f"attribute:{c}" in grid.concepts)
        if component == "z" or len(colors) < len(COLOR_NAMES):
            continue
        for layer in grid.layers:
            site = "projector.out" if stack == "projector" else f"{stack}.L{layer}.{component}"
            x = store.read(site, tokens, examples=rows)
            margins = np.stack([grid.decision(f"attribute:{c}", layer, None, x) for c in colors], axis=1)
            readings.append(
                ColorMargins(stack if stack == "projector" else f"{stack} {layer}", tokens, margins, colors)
            )
    return sorted(readings, key=_forward_order)


def _forward_order(reading: ColorMargins) -> tuple[bool, int, int]:
    stack, _, layer = reading.place.partition(" ")
    return reading.tokens == "last", ("vision", "projector", "decoder").index(stack), int(layer or 0)
