"""The files of a finished run, each read at its first use. Needs only the run folder: neither a model nor the data files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concepts.annotated_object import AnnotatedObject, Box
from concepts.concept import LEVELS
from concepts.image_source import NoImage
from concepts.mention import Mention
from concepts.outlines import outline_from_record
from concepts.schema import Example
from experiments.config import RunConfig
from experiments.records import (
    CHANGES,
    CLASS_SCORES,
    ENVIRONMENT,
    EXAMPLE,
    EXPORTS,
    GUARDS,
    MAX_BYTES,
    PLAN,
    RATES,
    REASON,
    SWEEP,
    TOP_HEADS,
    problem,
    read_record,
)
from experiments.results.illustrations import Illustrations, read_illustrations
from experiments.run.context import ACTIVATIONS, headline
from experiments.run.folder import OWN, Receipt, read_receipt
from experiments.run.stored_config import read_config
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.paths import below, is_file
from groundscope.core.statistics import Estimate
from groundscope.core.user_files import read_text
from probes import GridPlan, ProbeGrid

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from activation_store import ActivationStore
    from behavior.card import EvaluationCard
    from circuits import HeadScores
    from diagnosis import Diagnoses, RepresentationStudy
    from mitigation.arena.result import ArenaResult


class RunFiles:
    """The results in the folder of a run.

    Parameters
    ----------
    root
        Folder of the run; may be a copy.

    Raises
    ------
    ConfigError
        By an attribute, if its file is missing or damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def _record(self, name: str, shape: Any) -> Any:
        return read_record(below(self.root, name, error=ConfigError), shape)

    def _reason(self, name: str) -> str:
        return self._record(name, REASON)["reason"] if is_file(self.root / name) else ""

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the run."""
        return read_config(self.root)

    @property
    def headline(self) -> str:
        """Model, data and folder in one line."""
        return headline(self.config, self.root)

    @cached_property
    def examples(self) -> dict[str, Example]:
        """The discovery examples by id; their images cannot be loaded, `illustrations` has copies of some."""
        return {example.id: example for example in read_examples(self.root / "examples" / "discovery.jsonl")}

    @cached_property
    def store(self) -> ActivationStore | None:
        """The traced activations; None if the folder was copied without them."""
        from activation_store import ActivationStore

        folder = self.root / ACTIVATIONS
        return ActivationStore(folder) if is_file(folder / "manifest.json") else None

    @cached_property
    def frame(self) -> pd.DataFrame | None:
        """The table of examples of the store, one row per traced example; None without activations."""
        return self.store.frame() if self.store is not None else None

    @cached_property
    def grids(self) -> dict[tuple[str, str, str], ProbeGrid]:
        """Probe grids by stack, component and token selection."""
        folder = self.root / "probes"
        return {
            (e.stack, e.component, e.tokens): ProbeGrid.load(
                below(folder, e.name, source="plan.json", error=ConfigError)
            )
            for e in map(GridPlan.of, self._record("probes/plan.json", PLAN))
        }

    @cached_property
    def class_scores(self) -> list[dict[str, Any]]:
        """Scores of softmax probes among the classes of label columns, one record per grid, column and layer."""
        path = below(self.root, "probes/classes.json", error=ConfigError)
        return self._record("probes/classes.json", CLASS_SCORES) if is_file(path) else []

    @cached_property
    def missing_probes(self) -> str:
        """Why no probe was fitted; empty if some were."""
        return self._reason("probes/left_out.json")

    @cached_property
    def head_scores(self) -> dict[str, HeadScores]:
        """Patching effects of heads by kind of pair."""
        from circuits import HeadScores

        folder = self.root / "circuits"
        return {
            kind: HeadScores.load(below(folder, f"{kind}.safetensors", source=folder / "top.json", error=ConfigError))
            for kind in self._top["kinds"]
        }

    @cached_property
    def _top(self) -> dict[str, Any]:
        return self._record("circuits/top.json", TOP_HEADS)

    @property
    def top_heads(self) -> list[str]:
        """The heads that the next stages use, such as ``L4.H7``."""
        return self._top["heads"]

    @property
    def missing_pairs(self) -> dict[str, str]:
        """Kinds of pairs that the data do not allow, with the reason."""
        return self._top["left_out"]

    @property
    def pairs(self) -> dict[str, dict[str, Any]]:
        """Method, counts and reasons by kind of pair; empty for runs of earlier versions."""
        return self._top.get("pairs") or {}

    def control_scores(self, name: str) -> dict[str, HeadScores]:
        """Return control scores by kind of pair: ``all`` pairs, where only some localize, or ``placebo`` pairs."""
        from circuits import HeadScores

        folder, source = self.root / "circuits" / "controls", self.root / "circuits" / "top.json"
        files = {
            kind: below(folder, f"{kind}-{name}.safetensors", source=source, error=ConfigError) for kind in self.pairs
        }
        return {kind: HeadScores.load(file) for kind, file in files.items() if is_file(file)}

    @cached_property
    def sweep(self) -> dict[str, Any]:
        """Strengths that were tried, their results, and the choice."""
        return self._record("steering/sweep.json", SWEEP)

    @cached_property
    def rates(self) -> dict[str, dict[str, Estimate]]:
        """Estimates by condition and measure."""
        return _estimates(self._record("behavior/rates.json", RATES))

    @cached_property
    def changes(self) -> dict[str, dict[str, Estimate]]:
        """Paired differences to condition ``before``, by condition and measure."""
        return _estimates(self._record("behavior/changes.json", CHANGES))

    @cached_property
    def guards(self) -> dict[str, Any] | None:
        """Guards by condition, with labels, limits and the reasons for missing ones; None for a run of an earlier version."""
        file = "behavior/guards.json"
        return self._record(file, GUARDS) if is_file(self.root / file) else None

    @cached_property
    def arena(self) -> ArenaResult:
        """The comparison of training-free methods."""
        from mitigation.arena.result import ArenaResult

        return ArenaResult.load(below(self.root, "arena/arena.json", error=ConfigError))

    @cached_property
    def card(self) -> EvaluationCard:
        """The evaluation card."""
        from behavior.card import EvaluationCard

        return EvaluationCard.load(below(self.root, "card/card.json", error=ConfigError))

    @cached_property
    def representation(self) -> RepresentationStudy:
        """Alignment, information and ceilings."""
        from diagnosis import RepresentationStudy

        return RepresentationStudy.load(below(self.root, "representation", error=ConfigError))

    @cached_property
    def exports(self) -> dict[str, dict[str, str]]:
        """``written``: file by format; ``refused``: reason by format; ``vectors``: the vector in each file, if written."""
        return self._record("export/formats.json", EXPORTS)

    @cached_property
    def diagnoses(self) -> Diagnoses | None:
        """Diagnoses of wrong answers; None if no answer could be diagnosed."""
        from diagnosis import Diagnoses

        file = below(self.root, "diagnosis/diagnoses.json", error=ConfigError)
        return Diagnoses.load(file) if is_file(file) else None

    @cached_property
    def missing_diagnoses(self) -> str:
        """Why no answer was diagnosed; empty if some were."""
        return self._reason("diagnosis/left_out.json")

    def illustrations(self, folder: str) -> Illustrations | None:
        """Return the illustrations in the folder of a stage; None if an earlier version made it."""
        return read_illustrations(below(self.root, folder, error=ConfigError))

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Packages, machine and threads of the last call that made something."""
        return self._record("environment.json", ENVIRONMENT)

    @cached_property
    def receipts(self) -> dict[str, Receipt]:
        """Receipts of the finished stages, by folder."""
        receipts = {folder: read_receipt(self.root / folder) for folder in OWN}
        return {folder: receipt for folder, receipt in receipts.items() if receipt is not None}

    @property
    def finished(self) -> frozenset[str]:
        """The stages that have finished in this folder."""
        return frozenset(receipt.stage for receipt in self.receipts.values())


def _estimates(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    return {condition: {k: Estimate(**v) for k, v in rates.items()} for condition, rates in record.items()}


@dataclass(frozen=True)
class _AbsentImage:
    """The image of an example whose pixels are not in the run folder."""

    identity: str

    def load(self) -> Image.Image:
        msg = f"the run folder has no copy of the image {self.identity[:80]!r}"
        raise DataError(msg)


def read_examples(path: Path) -> list[Example]:
    """Read the examples that a run wrote as JSON, one record per line.

    Raises
    ------
    ConfigError
        If a line is not the record of an example; the message names it.
    """
    try:
        lines = read_text(path, limit=MAX_BYTES, error=ConfigError).splitlines()
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror or error}"
        raise ConfigError(msg) from error
    return [_example(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _example(line: str, place: str) -> Example:
    try:
        record = json.loads(line)
        wrong = problem(record, EXAMPLE)
        if wrong is None and record["level"] not in LEVELS:
            wrong = f"level must be one of {', '.join(LEVELS)}, not {record['level']!r}"
        if wrong is not None:
            raise ConfigError(wrong)
        return Example(
            **{
                **record,
                "image": NoImage() if record["image"] == NoImage().identity else _AbsentImage(record["image"]),
                "candidates": tuple(record["candidates"]),
                "objects": _objects(record["objects"]),
                "prefix": record.get("prefix") or "",
                "mentions": tuple(Mention(**mention) for mention in record.get("mentions") or ()),
                "aliases": tuple(record.get("aliases") or ()),
                "further_images": tuple(map(_AbsentImage, record.get("further_images") or ())),
                "suffix": record.get("suffix") or "",
            }
        )
    except (ValueError, TypeError, RecursionError, DataError) as error:
        msg = f"{place} is not the record of an example: {str(error).splitlines()[0]}"
        raise ConfigError(msg) from error


def _objects(records: Sequence[Mapping[str, Any]]) -> tuple[AnnotatedObject, ...]:
    return tuple(
        AnnotatedObject(
            **{
                **r,
                "box": None if r["box"] is None else Box(**r["box"]),
                "outline": outline_from_record(r.get("outline")),
            }
        )
        for r in records
    )
