"""The figures of a run that sweeps, `status` and `compare` tell, read from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concepts.schema import LEVELS
from experiments.run.folder import RECEIPT


@dataclass(frozen=True)
class Headline:
    """One figure of a run; a row of a tidy table."""

    stage: str
    measure: str
    value: float
    low: float | None = None
    """Lower end of its 95 % interval, where it has one."""
    high: float | None = None
    control: float | None = None
    """The same under its control, where it has one."""
    main: bool = True
    """Whether it is worth a picture of its own."""

    @property
    def name(self) -> str:
        """What tells it from the others of a run."""
        return f"{self.stage}: {self.measure}"


def headlines(run: Path, *, quick: bool = False) -> list[Headline]:
    """Return the figures of the stages that a run has finished.

    Parameters
    ----------
    run
        Folder of the run.
    quick
        Only what can be read without loading probes and head scores.
    """
    found = [*_steering(run), *_behavior(run)]
    if not quick:
        found = [*_probes(run), *_heads(run), *found]
    return [*found, *_seconds(run)]


def _read(run: Path, folder: str, name: str) -> Any:
    """Return a stage's JSON, None where the stage is not finished."""
    path = run / folder / name
    return json.loads(path.read_text()) if (run / folder / RECEIPT).is_file() and path.is_file() else None


def _probes(run: Path) -> Iterator[Headline]:
    plan = _read(run, "probes", "plan.json")
    if plan is None:
        return
    from experiments.stages.probe_plan import Entry
    from probes import ProbeGrid

    for entry in (Entry(**{**e, "concepts": tuple(e["concepts"])}) for e in plan):
        grid = ProbeGrid.load(run / "probes" / entry.name)
        best = [grid.best(concept) for concept in grid.concepts]
        # Cells are chosen by validation, so the held-out value of the best one is not the best of many.
        for level in LEVELS:
            cells = [c for c in best if c.concept.startswith(f"{level}:")]
            if cells:
                value, control = (
                    sum(getattr(c, name) for c in cells) / len(cells) for name in ("balanced_accuracy", "control")
                )
                measure = f"{entry.name}, {level}: best cell, mean of {len(cells)}"
                yield Headline("probe", measure, float(value), control=float(control))
        for cell in best:
            yield Headline(
                "probe",
                f"{entry.name}, {cell.concept}: best cell",
                float(cell.balanced_accuracy),
                float(cell.low),
                float(cell.high),
                float(cell.control),
                main=False,
            )


def _heads(run: Path) -> Iterator[Headline]:
    top = _read(run, "circuits", "top.json")
    if top is None or not top["kinds"]:
        return
    from circuits import HeadScores

    for kind in top["kinds"]:
        scores = HeadScores.load(run / "circuits" / f"{kind}.safetensors")
        head = scores.top(1)[0]
        value, low, high = (float(x[head.layer, head.head]) for x in (scores.mean, *scores.interval()))
        yield Headline("patch", f"{kind}: effect of the strongest head", value, low, high)


def _steering(run: Path) -> Iterator[Headline]:
    sweep = _read(run, "steering", "sweep.json")
    if sweep is not None:
        for name in ("strength", "harm", "cost"):
            if name in sweep["chosen"]:
                yield Headline("steer", f"chosen {name}", float(sweep["chosen"][name]))


def _behavior(run: Path) -> Iterator[Headline]:
    rates = _read(run, "behavior", "rates.json")
    for condition, found in (rates or {}).items():
        for name, rate in found.items():
            main = condition in {"before", "after"}
            yield Headline("evaluate", f"{name}, {condition}", rate["value"], rate["low"], rate["high"], main=main)


def _seconds(run: Path) -> Iterator[Headline]:
    for path in sorted(run.glob(f"*/{RECEIPT}")):
        receipt = json.loads(path.read_text())
        yield Headline(receipt["stage"], "seconds", float(receipt["seconds"]), main=False)
