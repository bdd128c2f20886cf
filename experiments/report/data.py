"""What the report says, gathered from the files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.scenes.distributions import COLOR_NAMES, TYPICAL
from concepts.schema import Example
from experiments.records import ENVIRONMENT, EXPORTS, PLAN, RATES, REASON, SWEEP, TOP_HEADS, read_record
from experiments.run.context import Context
from experiments.run.folder import OWN, read_receipt
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file
from groundscope.core.statistics import Estimate
from probes import GridPlan, ProbeGrid

if TYPE_CHECKING:
    from circuits import HeadScores
    from diagnosis import Diagnoses


def mean_defined(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over the first axis of what is not NaN; NaN where nothing is: a concept may have no control."""
    table = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(table)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, table, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class Spot:
    """A place, and what probes reach there: means over the concepts of a level."""

    place: str
    value: float
    """Balanced accuracy, held out."""
    low: float
    high: float
    control: float
    """The same with shuffled labels."""


@dataclass(frozen=True)
class Facts:
    """The files of a run, read when first asked for."""

    context: Context

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.context.folder.path

    def _json(self, name: str, shape: Any) -> Any:
        return read_record(below(self.root, name, error=ConfigError), shape)

    @cached_property
    def rates(self) -> dict[str, dict[str, Estimate]]:
        """Condition to measure to rate."""
        return {
            run: {k: Estimate(**v) for k, v in found.items()}
            for run, found in self._json("behavior/rates.json", RATES).items()
        }

    @cached_property
    def changes(self) -> dict[str, dict[str, Estimate]]:
        """Condition to measure to its paired change against before."""
        found = self._json("behavior/changes.json", RATES)
        return {run: {k: Estimate(**v) for k, v in part.items()} for run, part in found.items()}

    @cached_property
    def sweep(self) -> dict[str, Any]:
        """How the strength was chosen."""
        return self._json("steering/sweep.json", SWEEP)

    @cached_property
    def exports(self) -> dict[str, dict[str, str]]:
        """``written``: format to file; ``refused``: format to why it cannot hold the vector."""
        return self._json("export/formats.json", EXPORTS)

    @cached_property
    def grids(self) -> dict[tuple[str, str, str], ProbeGrid]:
        """(stack, component, tokens) to grid."""
        folder = self.root / "probes"
        return {
            (e.stack, e.component, e.tokens): ProbeGrid.load(
                below(folder, e.name, source="plan.json", error=ConfigError)
            )
            for e in map(GridPlan.of, self._json("probes/plan.json", PLAN))
        }

    @cached_property
    def no_probes(self) -> str:
        """Why no probe was fitted; empty where some were."""
        file = self.root / "probes" / "left_out.json"
        return self._json("probes/left_out.json", REASON)["reason"] if is_file(file) else ""

    @cached_property
    def heads(self) -> dict[str, HeadScores]:
        """Kind of pair to head scores."""
        from experiments.stages.steer import head_scores

        return head_scores(self.context)

    @cached_property
    def top(self) -> list[str]:
        """The heads carried on with, as printed."""
        return self._json("circuits/top.json", TOP_HEADS)["heads"]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Kinds of pairs the data could not make, with the reason."""
        return self._json("circuits/top.json", TOP_HEADS)["left_out"]

    @cached_property
    def diagnoses(self) -> Diagnoses | None:
        """Why answers are wrong; None where none could be diagnosed."""
        from diagnosis import Diagnoses

        file = self.root / "diagnosis" / "diagnoses.json"
        return Diagnoses.load(file) if is_file(file) else None

    @cached_property
    def undiagnosed(self) -> str:
        """Why nothing was diagnosed; empty where something was."""
        file = self.root / "diagnosis" / "left_out.json"
        return self._json("diagnosis/left_out.json", REASON)["reason"] if is_file(file) else ""

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Packages and machine."""
        return self._json("environment.json", ENVIRONMENT)

    def stages(self) -> list[tuple[str, str, str, float, str]]:
        """Return (stage, what it did, folder, seconds, key) of every stage with a receipt."""
        found = [(folder, read_receipt(self.root / folder)) for folder in OWN]
        return [(r.stage, r.summary, folder, r.seconds, r.key[:12]) for folder, r in found if r is not None]

    def level_arrays(
        self, stack: str, component: str, tokens: str, level: str
    ) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
        """Return accuracy and control ``[L]`` or ``[L, H]`` averaged over a level's concepts; None where none was probed."""
        grid = self.grids.get((stack, component, tokens))
        if grid is None:
            return None
        names = [
            c for c in grid.concepts if c.startswith(f"{level}:") and (level == "object" or not c.endswith(":named"))
        ]
        if not names:
            return None
        return (
            np.mean([grid.array(c) for c in names], axis=0),
            mean_defined([grid.array(c, "control") for c in names]),
            names,
        )

    def best(self, level: str, tokens: str) -> Spot | None:
        """Return the decoder layer whose probes of a level did best on training rows, with what they reach held out."""
        found = self.level_arrays("decoder", "resid_post", tokens, level)
        if found is None:
            return None
        grid = self.grids["decoder", "resid_post", tokens]
        at = int(np.mean([grid.array(c, "validation") for c in found[2]], axis=0).argmax())
        low, high = (float(np.mean([grid.array(c, end)[at] for c in found[2]])) for end in ("low", "high"))
        return Spot(f"layer {grid.layers[at]}", float(found[0][at]), low, high, float(found[1][at]))

    def way(self, level: str, tokens: str) -> list[tuple[str, float, float, float, float]]:
        """Return (place, accuracy, low, high, control) along vision tower, projector and decoder for a level."""
        points = []
        for stack, component in (("vision", "resid_post"), ("projector", "out"), ("decoder", "resid_post")):
            grid = self.grids.get((stack, component, tokens))
            if grid is None:
                continue
            names = [
                c
                for c in grid.concepts
                if c.startswith(f"{level}:") and (level == "object" or not c.endswith(":named"))
            ]
            if not names:
                continue
            for i, layer in enumerate(grid.layers):
                place = stack if stack == "projector" else f"{stack} {layer}"
                values = [
                    mean_defined([grid.array(c, s)[i] for c in names])
                    for s in ("balanced_accuracy", "low", "high", "control")
                ]
                points.append((place, *(float(v) for v in values)))
        return points

    @cached_property
    def frame(self) -> Any:
        """The store's table of examples."""
        return self.context.store.frame()

    @cached_property
    def examples(self) -> list[Example]:
        """The store's examples, row by row."""
        by_id = {e.id: e for e in self.context.discovery}
        return [by_id[name] for name in self.frame["id"]]

    @cached_property
    def misled(self) -> list[int]:
        """Rows of the conflict examples that the model answered as the prior would, and wrongly."""
        said = self.frame["model_answer"]
        return [
            i
            for i, e in enumerate(self.examples)
            if e.split == "conflict" and e.prior_answer is not None and said[i] == e.prior_answer != e.answer
        ]

    def apple(self) -> int | None:
        """Return the row of the example told in full: of those the prior gets wrong, one about an apple where there is one.

        Chosen by the question and the picture alone, never by what steering makes of it: a green apple, else an apple,
        else the first; questions for the color before questions for yes or no. None where the data have no such error.
        """
        wrong = self.misled

        def rank(row: int) -> tuple[bool, bool, bool]:
            example = self.examples[row]
            thing = example.named_object()
            apple = thing is not None and thing.noun == "apple"
            green = thing is not None and thing.attributes.get("color") == "green"
            return not apple, not green, example.kind != "what_color"

        return min(wrong, key=rank) if wrong else None

    def known(self) -> list[tuple[str, float, float, int]]:
        """Return, over all conflict examples the prior gets wrong, how often probes read the true color at each place.

        Rows are (place, share of examples whose true color has the largest margin of the six, the same for the
        prior's color, number of examples). Probes were fitted on neutral scenes only.
        """
        kept = self.misled
        rows: list[tuple[str, float, float, int]] = []
        if not kept:
            return rows
        things = [self.examples[i].named_object() for i in kept]
        true = [t.attributes["color"] if t else "" for t in things]
        prior = [TYPICAL[t.noun][0] if t else "" for t in things]
        for place, tokens, margins, colors in self.color_margins(np.array(kept)):
            best = np.array(colors)[margins.argmax(1)]
            name = f"{place} ({'object tokens' if tokens == 'object:mean' else 'last token'})"
            rows.append(
                (name, float(np.mean(best == np.array(true))), float(np.mean(best == np.array(prior))), len(kept))
            )
        return rows

    def color_margins(self, rows: np.ndarray) -> Sequence[tuple[str, str, np.ndarray, list[str]]]:
        """Return (place, tokens, margins ``[n, colors]``, colors) of the color probes for some rows of the store."""
        found = []
        for (stack, component, tokens), grid in self.grids.items():
            colors = [c for c in COLOR_NAMES if f"attribute:{c}" in grid.concepts]
            if component == "z" or len(colors) < len(COLOR_NAMES):
                continue
            for layer in grid.layers:
                site = "projector.out" if stack == "projector" else f"{stack}.L{layer}.{component}"
                x = self.context.store.read(site, tokens, examples=rows)
                margins = np.stack([grid.decision(f"attribute:{c}", layer, None, x) for c in colors], axis=1)
                found.append((stack if stack == "projector" else f"{stack} {layer}", tokens, margins, colors))
        order = {"vision": 0, "projector": 1, "decoder": 2}
        return sorted(found, key=lambda f: (f[1] == "last", order[f[0].split()[0]], int([*f[0].split(), "0"][1])))
