"""Two models, or one before and after a change, on the same data: what changed in answers, probes, heads and diagnoses.

Answers are compared question by question, probes on the same held-out examples, heads pair by pair wherever both runs had the
same ones; every interval draws whole images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from behavior import BehaviorResult
from behavior.comparison import change_interval, mcnemar_by_group, same_questions
from behavior.metrics import METRICS
from behavior.result import Answer
from circuits.results.head_scores import HeadScores
from circuits.results.statistics import Rows, compare_rows
from diagnosis.results import RIGHT, VERDICTS, Diagnoses
from experiments.run.folder import file_digest, write_json
from groundscope.core.errors import ConfigError
from probes import ProbeGrid
from probes.protocol.scoring import class_totals, difference_interval

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("answers", "probes", "heads", "ranking", "verdicts")
DIAGNOSES = "diagnosis/diagnoses.json"
RESAMPLES = 500
_TOP = (5, 10)


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of one model on some data."""

    name: str
    answers: BehaviorResult
    grids: Mapping[str, ProbeGrid] = field(default_factory=dict)
    """By name: ``decoder.z@last``."""
    heads: Mapping[str, HeadScores] = field(default_factory=dict)
    """By kind of pair."""
    diagnoses: Diagnoses | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: the model's hashes, files and their digests."""

    def __post_init__(self) -> None:
        for name in ("grids", "heads", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What changed from a first model to a second; differences are second minus first, with 95 % intervals over images."""

    first: str
    second: str
    answers: pd.DataFrame
    """A row a measure: ``measure``, ``n``, ``first``, ``second``, ``difference``, ``low``, ``high``, ``gained``, ``lost``
    (questions that count for the second, or the first, alone) and McNemar's ``p``."""
    probes: pd.DataFrame
    """A row a probe that both have: ``grid``, ``concept``, ``layer``, ``head``, held-out balanced accuracy of both,
    ``difference``, ``low``, ``high``, ``n``, ``paired`` (whether both were scored on the same held-out examples)."""
    heads: pd.DataFrame
    """A row a kind of pair and head: ``kind``, ``name``, mean patching effect of both, ``difference``, ``low``, ``high``."""
    ranking: pd.DataFrame
    """A row a kind of pair: how alike both rank the heads, ``rank_correlation``, ``overlap_5``, … with intervals."""
    verdicts: pd.DataFrame
    """A row a pair of verdicts, ``first`` and ``second``, with the number of questions ``n``; ``right`` for right answers."""
    notes: tuple[str, ...] = ()
    """What could not be compared, and why."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def frame(self, part: str = "answers") -> pd.DataFrame:
        """Return one of the tables, of `PARTS`; raises `ConfigError` for another name."""
        if part not in PARTS:
            msg = f"no table '{part}' in a comparison: there are {', '.join(PARTS)}"
            raise ConfigError(msg)
        return getattr(self, part).copy()

    def moved(self, part: str = "answers") -> pd.DataFrame:
        """Return the rows whose interval of the difference leaves 0 out; raises `ConfigError` for what has no differences."""
        table: Any = self.frame(part)
        if "difference" not in table:
            msg = f"table '{part}' has no differences: choose answers, probes or heads"
            raise ConfigError(msg)
        return table[(table["low"] > 0) | (table["high"] < 0)].reset_index(drop=True)

    def text(self) -> str:
        """Say in some lines what changed."""
        lines = [f"{self.second} against {self.first}:"]
        for row in self.moved("answers").to_dict("records"):
            lines.append(
                f"  {row['measure']}: {100 * row['first']:.1f} % -> {100 * row['second']:.1f} % "
                f"({100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], n {row['n']})"
            )
        if len(lines) == 1:
            lines.append("  no measure of the answers changed beyond its interval")
        for part in ("probes", "heads"):
            table = self.frame(part)
            if len(table):
                lines.append(f"  {part}: {len(self.moved(part))} of {len(table)} changed beyond their interval")
        for row in self.ranking.to_dict("records"):
            lines.append(f"  heads for {row['kind']}: rank correlation {row['rank_correlation']:.2f}")
        changed = [row for row in self.verdicts.to_dict("records") if row["first"] != row["second"]]
        for row in sorted(changed, key=lambda row: -row["n"])[:5]:
            lines.append(f"  {row['n']} answers: {row['first']} -> {row['second']}")
        return "\n".join([*lines, *(f"  not compared: {note}" for note in self.notes)])

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file, a list of rows for each table."""
        tables = {
            part: json.loads(str(self.frame(part).to_json(orient="records", double_precision=15))) for part in PARTS
        }
        card = {"first": self.first, "second": self.second, "notes": list(self.notes)}
        write_json(Path(path), {**card, "provenance": dict(self.provenance), **tables})
        return Path(path)


def compare_runs(
    first: str | Path, second: str | Path, *, conditions: tuple[str, str] = ("before", "before")
) -> Comparison:
    """Compare two finished run folders, or one run with itself under another condition.

    Parameters
    ----------
    first, second
        Folders of runs on the same test questions.
    conditions
        Whose answers are compared, of ``before``, ``after`` (steered), ``random direction``, ``other heads``, ``twin``.
        Probes, heads and diagnoses are always those of the model as it is.

    Raises
    ------
    ConfigError
        Where a folder holds no finished run, or not under this condition.
    DataError
        Where the two answered different questions.
    """
    return compare(read_run(first, conditions[0]), read_run(second, conditions[1]))


def read_run(path: str | Path, condition: str = "before") -> Measured:
    """Return what a finished run found; raises `ConfigError` where it has no answers under the condition."""
    root = Path(path)
    answers = root / "behavior" / f"{condition.replace(' ', '-')}.json"
    if not answers.is_file():
        there = sorted(p.stem.replace("-", " ") for p in (root / "behavior").glob("*.json"))
        known = [name for name in there if name not in {"rates", "changes", "stage"}]
        exists = f"there are answers {', '.join(known)}" if known else "it has no answers: finish the run first"
        msg = f"no answers '{condition}' in the run folder '{root}': {exists}"
        raise ConfigError(msg)
    cards = sorted((root / "probes").glob("*/grid.json"))
    scores = sorted((root / "circuits").glob("*.safetensors"))
    found = root / DIAGNOSES
    used = [answers, *cards, *scores, *([found] if found.is_file() else [])]
    name = root.name if condition == "before" else f"{root.name} ({condition})"
    return Measured(
        name,
        BehaviorResult.load(answers),
        {card.parent.name: ProbeGrid.load(card.parent) for card in cards},
        {file.stem: HeadScores.load(file) for file in scores},
        Diagnoses.load(found) if found.is_file() else None,
        {"folder": str(root), "files": {str(p.relative_to(root)): file_digest(p) for p in used}},
    )


def compare(first: Measured, second: Measured, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare what is known of two models; parts that only one has, or that do not fit, are named in `Comparison.notes`.

    Parameters
    ----------
    first, second
        Of the same questions.
    resamples, seed
        Of the bootstrap of heads; differences of answers and probes have a formula.

    Raises
    ------
    DataError
        Where the two answered different questions.
    """
    import pandas as pd

    notes: list[str] = []
    pairs = same_questions(first.answers, second.answers)
    heads, ranking = _heads(first.heads, second.heads, notes, resamples, seed)
    columns = ["grid", "concept", "layer", "head", "first", "second", "difference", "low", "high", "n", "paired"]
    probes = pd.DataFrame(_probes(first.grids, second.grids, notes), columns=columns)
    return Comparison(
        first.name,
        second.name,
        pd.DataFrame(_answers(pairs)),
        probes.astype({"head": "Int64"}),
        heads,
        ranking,
        pd.DataFrame(_verdicts(first.diagnoses, second.diagnoses, notes), columns=["first", "second", "n"]),
        tuple(notes),
        {"first": dict(first.provenance), "second": dict(second.provenance), "resamples": resamples, "seed": seed},
    )


Counts = Callable[[Answer], bool]


def _measures(answers: Sequence[Answer]) -> Iterator[tuple[str, Counts, Counts]]:
    """Yield name, which answers count and what is counted: the measures of a run, then right answers of what they leave out."""
    for name, metric in METRICS.usable().items():
        yield name, metric.applies, metric.counts
    for column in ("level", "split", "kind"):
        for value in dict.fromkeys(getattr(a, column) for a in answers):

            def counts(a: Answer, column: str = column, value: str = value) -> bool:
                return a.correct is not None and getattr(a, column) == value

            yield f"{column} {value}: right", counts, lambda a: bool(a.correct)


def _answers(pairs: Sequence[tuple[Answer, Answer]]) -> Iterator[dict[str, Any]]:
    for name, counts, value in _measures([a for a, _ in pairs]):
        kept = [(a, b) for a, b in pairs if counts(a) and counts(b)]
        if not kept:
            continue
        table = np.array([[bool(value(a)), bool(value(b))] for a, b in kept], dtype=np.int64)
        change = table[:, 1] - table[:, 0]
        groups = [a.group for a, _ in kept]
        low, high = change_interval(change, groups)
        gained, lost = int((change == 1).sum()), int((change == -1).sum())
        rates = {"first": float(table[:, 0].mean()), "second": float(table[:, 1].mean())}
        yield {
            "measure": name, "n": len(kept), **rates, "difference": float(change.mean()), "low": low, "high": high,
            "gained": gained, "lost": lost, "p": mcnemar_by_group(change, groups),
        }  # fmt: skip


def _probes(
    first: Mapping[str, ProbeGrid], second: Mapping[str, ProbeGrid], notes: list[str]
) -> Iterator[dict[str, Any]]:
    for name in sorted({*first, *second}):
        if name not in first or name not in second:
            notes.append(f"probes {name}: only one of the two has them")
            continue
        a, b = first[name], second[name]
        concepts = [c for c in a.concepts if c in b.concepts]
        layers = [layer for layer in a.layers if layer in b.layers]
        if a.n_heads != b.n_heads or not concepts or not layers:
            notes.append(f"probes {name}: the two have no layers, heads and concepts in common")
            continue
        alike = a.held_out == b.held_out and np.array_equal(_labels(a, concepts), _labels(b, concepts), equal_nan=True)
        if not alike:
            notes.append(f"probes {name}: held-out examples differ, so differences are not paired")
        for concept in concepts:
            # Groups that both have are the same axis: scores of one image rise and fall together, paired or not.
            names = np.unique([*a.held_out_groups, *b.held_out_groups])
            scores = [_scores(grid, concept, layers, names) for grid in (a, b)]
            low, high = difference_interval(scores[1][1], scores[0][1])
            values = [found[0] for found in scores]
            for cell, (layer, head) in enumerate((i, h) for i in layers for h in range(a.n_heads or 1)):
                yield {
                    "grid": name, "concept": concept, "layer": layer, "head": head if a.n_heads else None,
                    "first": values[0][cell], "second": values[1][cell],
                    "difference": values[1][cell] - values[0][cell], "low": low[cell], "high": high[cell],
                    "n": scores[0][2], "paired": alike,
                }  # fmt: skip


def _labels(grid: ProbeGrid, concepts: Sequence[str]) -> np.ndarray:
    return grid.held_out_labels[[grid.concepts.index(c) for c in concepts]]


def _scores(
    grid: ProbeGrid, concept: str, layers: Sequence[int], names: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], int]:
    """Return balanced accuracy of each layer and head ``[cells]``, its `class_totals` by named group, and the number of rows."""
    k, at = grid.concepts.index(concept), [grid.layers.index(layer) for layer in layers]
    defined = ~np.isnan(grid.held_out_labels[k])
    truth = grid.held_out_labels[k, defined]
    margins = grid.held_out_margins[k][at][..., defined].reshape(-1, len(truth))
    of_row = np.searchsorted(names, np.array(grid.held_out_groups)[defined])
    return grid.balanced_accuracy[k][at].ravel(), class_totals(truth, margins, of_row, len(names)), len(truth)


def _heads(
    first: Mapping[str, HeadScores], second: Mapping[str, HeadScores], notes: list[str], resamples: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    rows, ranks = [], []
    for kind in sorted({*first, *second}):
        if kind not in first or kind not in second:
            notes.append(f"heads for {kind}: only one of the two has them")
            continue
        a, b = first[kind], second[kind]
        if a.shape != b.shape:
            notes.append(f"heads for {kind}: {a.shape} and {b.shape} layers and heads cannot be set side by side")
            continue
        found = compare_rows(Rows(b.effects, b.groups), Rows(a.effects, a.groups), _TOP, resamples=resamples, seed=seed)
        for layer in range(a.shape[0]):
            for head in range(a.shape[1]):
                at = (layer, head)
                rows.append(
                    {
                        "kind": kind,
                        "name": f"L{layer}.H{head}",
                        "first": a.mean[at],
                        "second": b.mean[at],
                        "difference": found.difference[at],
                        "low": found.low[at],
                        "high": found.high[at],
                    }
                )
        overlaps = {f"overlap_{k}": found.overlap[k].value for k in _TOP}
        of = found.rank_correlation
        ends = {"rank_correlation": of.value, "rank_correlation_low": of.low, "rank_correlation_high": of.high}
        ranks.append({"kind": kind, **ends, **overlaps, "shared_groups": found.groups[2]})
    named = ["kind", "name", "first", "second", "difference", "low", "high"]
    of_ranks = ["kind", "rank_correlation", "rank_correlation_low", "rank_correlation_high"]
    wanted = [*of_ranks, *(f"overlap_{k}" for k in _TOP), "shared_groups"]
    return pd.DataFrame(rows, columns=named), pd.DataFrame(ranks, columns=wanted)


def _verdicts(first: Diagnoses | None, second: Diagnoses | None, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield how often each verdict of the first model met each of the second, over the questions that both were asked."""
    if first is None or second is None:
        if first is not None or second is not None:
            notes.append("diagnoses: only one of the two has them")
        return
    found = [{one.example["id"]: one.verdict or RIGHT for one in some.examples} for some in (first, second)]
    shared = [name for name in found[0] if name in found[1]]
    if not shared:
        notes.append("diagnoses: the two have no question in common")
    for a in (RIGHT, *VERDICTS):
        for b in (RIGHT, *VERDICTS):
            n = sum(found[0][name] == a and found[1][name] == b for name in shared)
            if n:
                yield {"first": a, "second": b, "n": n}
