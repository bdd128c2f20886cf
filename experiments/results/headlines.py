"""The main results of a run for sweeps, `status` and `compare`, read from its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concepts.concept import LEVELS, Concept
from experiments.records import HEADLINE_RATES, NUMBER, PLAN, TOP_HEADS, read_record
from experiments.run.folder import OWN, RECEIPT, read_receipt
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file


@dataclass(frozen=True)
class Headline:
    """One result of a run: a row of a tidy table."""

    stage: str
    measure: str
    value: float
    low: float | None = None
    """Lower end of its 95 % interval, if it has one."""
    high: float | None = None
    control: float | None = None
    """The same quantity for its control, if it has one."""
    main: bool = True
    """Whether the page of a sweep has a figure of it."""

    @property
    def name(self) -> str:
        """Stage and measure, unique in a run."""
        return f"{self.stage}: {self.measure}"


def headlines(run: Path, *, quick: bool = False) -> list[Headline]:
    """Return the main results of the finished stages of a run.

    Parameters
    ----------
    run
        Folder of the run.
    quick
        Leave out the results of probes and head scores, whose files take longer to read.
    """
    results = [*_steering(run), *_behavior(run)]
    if not quick:
        results = [*_probes(run), *_heads(run), *results]
    return [*results, *_seconds(run)]


def _read(run: Path, folder: str, name: str, shape: Any) -> Any:
    """Return a JSON file of a stage; None if the stage is not finished."""
    path = below(run, f"{folder}/{name}", error=ConfigError)
    if not is_file(run / folder / RECEIPT) or not is_file(path):
        return None
    return read_record(path, shape)


def _probes(run: Path) -> Iterator[Headline]:
    plan = _read(run, "probes", "plan.json", PLAN)
    if plan is None:
        return
    from probes import GridPlan, ProbeGrid

    for entry in map(GridPlan.of, plan):
        grid = ProbeGrid.load(below(run / "probes", entry.name, source="plan.json", error=ConfigError))
        best = [grid.best(concept) for concept in grid.concepts]
        # Cells are chosen in validation, so the held-out value of the best cell is not a maximum over many.
        for level in LEVELS:
            cells = [c for c in best if c.concept.startswith(f"{level}:")]
            if cells:
                value, control = (
                    sum(getattr(c, name) for c in cells) / len(cells) for name in ("balanced_accuracy", "control")
                )
                measure = f"{entry.name}, {level}: best cell, mean of {len(cells)}"
                yield Headline("probe", measure, float(value), control=float(control))
        for cell in best:
            number = cell.concept in grid.numbers
            value, low, high = (
                (cell.r2, cell.r2_low, cell.r2_high) if number else (cell.balanced_accuracy, cell.low, cell.high)
            )
            measure = f"{entry.name}, {cell.concept}: best cell{', R2' if number else ''}"
            own = not Concept.parse(cell.concept).level  # a label of the user's own
            yield Headline("probe", measure, value, low, high, cell.control, main=own)


def _heads(run: Path) -> Iterator[Headline]:
    top = _read(run, "circuits", "top.json", TOP_HEADS)
    if top is None or not top["kinds"]:
        return
    from circuits import HeadScores

    for kind in top["kinds"]:
        name = f"{kind}.safetensors"
        scores = HeadScores.load(below(run / "circuits", name, source="top.json", error=ConfigError))
        head = scores.top(1)[0]
        value, low, high = (float(x[head.layer, head.head]) for x in (scores.mean, *scores.interval()))
        yield Headline("patch", f"{kind}: effect of the strongest head", value, low, high)


def _steering(run: Path) -> Iterator[Headline]:
    sweep = _read(run, "steering", "sweep.json", {"chosen": {"*": NUMBER}})
    if sweep is not None:
        for name in ("strength", "harm", "cost"):
            if name in sweep["chosen"]:
                yield Headline("steer", f"chosen {name}", float(sweep["chosen"][name]))


def _behavior(run: Path) -> Iterator[Headline]:
    rates = _read(run, "behavior", "rates.json", HEADLINE_RATES)
    for condition, measures in (rates or {}).items():
        for name, rate in measures.items():
            main = condition in {"before", "after"}
            yield Headline("evaluate", f"{name}, {condition}", rate["value"], rate["low"], rate["high"], main=main)


def _seconds(run: Path) -> Iterator[Headline]:
    for folder in sorted(OWN):
        receipt = read_receipt(run / folder)
        if receipt is not None:
            yield Headline(receipt.stage, "seconds", float(receipt.seconds), main=False)
