"""Compare two models, or one model before and after a change, on the same data: answers, probes, heads and diagnoses.

Answers are compared question by question, probes on the same held-out examples, heads pair by pair if both models have the
same pairs. All intervals are clustered by image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from behavior import BehaviorResult
from behavior.comparison import change_interval, mcnemar_by_group, same_questions
from behavior.metrics import METRICS
from behavior.result import Answer
from circuits.results.head_scores import HeadScores
from circuits.results.statistics import GroupedScores, compare_rows
from diagnosis.results import RIGHT, VERDICTS, Diagnoses
from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, StoreError
from groundscope.core.result_fields import building
from groundscope.core.text import format_count, nearest
from probes import ProbeGrid
from probes.protocol.scoring import class_totals, difference_interval

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("answers", "probes", "heads", "ranking", "verdicts")
RESAMPLES = 500
FORMAT, VERSION = "groundscope.model_comparison", 1
_TOP = (5, 10)
_CHANGE = ("first", "second", "difference", "low", "high")
COLUMNS: Mapping[str, list[str]] = MappingProxyType(
    {
        "answers": ["measure", "n", *_CHANGE, "gained", "lost", "p"],
        "probes": ["grid", "concept", "layer", "head", *_CHANGE, "n", "paired"],
        "heads": ["kind", "name", *_CHANGE],
        "ranking": [
            "kind",
            *("rank_correlation", "rank_correlation_low", "rank_correlation_high"),
            *(f"overlap_{k}" for k in _TOP),
            "shared_groups",
        ],
        "verdicts": ["first", "second", "n"],
    }
)
"""Columns of each table."""


@dataclass(frozen=True, eq=False)
class ModelProfile:
    """Answers, probes, head scores and diagnoses of one model on some data.

    Examples
    --------
    >>> from behavior import BehaviorResult, Cost
    >>> from diagnosis import ModelProfile
    >>> ModelProfile("tiny", BehaviorResult((), Cost(None, None, 0))).grids
    mappingproxy({})
    """

    name: str
    answers: BehaviorResult
    grids: Mapping[str, ProbeGrid] = field(default_factory=dict)
    """By name: ``decoder.z@last``."""
    heads: Mapping[str, HeadScores] = field(default_factory=dict)
    """By kind of pair."""
    diagnoses: Diagnoses | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of the model, or files and their digests."""

    def __post_init__(self) -> None:
        for name in ("grids", "heads", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """What changed from a first model to a second; differences are second minus first, with 95 % intervals over images.

    Examples
    --------
    >>> from behavior import Answer, BehaviorResult, Cost
    >>> from diagnosis import ModelProfile, compare_profiles
    >>> def profile(name: str, given: str) -> ModelProfile:
    ...     about = ("image", "neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    ...     return ModelProfile(name, BehaviorResult((Answer("q", *about, given, given == "yes"),), Cost(None, None, 1)))
    >>> comparison = compare_profiles(profile("before", "no"), profile("after", "yes"))
    >>> row = comparison.frame("answers").iloc[0]
    >>> row["measure"], float(row["first"]), float(row["second"])
    ('all: right', 0.0, 1.0)
    """

    first: str
    second: str
    answers: pd.DataFrame
    """One row per metric: ``measure``, ``n``, ``first``, ``second``, ``difference``, ``low``, ``high``, ``gained`` and ``lost``
    (questions counted for the second model only, or for the first only) and McNemar's ``p``."""
    probes: pd.DataFrame
    """One row per probe that both have: ``grid``, ``concept``, ``layer``, ``head``, held-out balanced accuracy of both,
    ``difference``, ``low``, ``high``, ``n``, ``paired`` (whether both were scored on the same held-out examples)."""
    heads: pd.DataFrame
    """One row per kind of pair and head: ``kind``, ``name``, mean patching effect of both, ``difference``, ``low``, ``high``."""
    ranking: pd.DataFrame
    """One row per kind of pair: agreement of the rankings of heads, ``rank_correlation``, ``overlap_5``, … with intervals."""
    verdicts: pd.DataFrame
    """One row per pair of verdicts, ``first`` and ``second``, with the number of questions ``n``; ``right`` for right answers."""
    notes: tuple[str, ...] = ()
    """What could not be compared, with the reason."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def frame(self, part: str = "answers") -> pd.DataFrame:
        """Return one of the tables, of `PARTS`; raises `ConfigError` for another name."""
        if part not in PARTS:
            msg = f"unknown table '{part}'; choose from {', '.join(PARTS)}{nearest(part, PARTS)}"
            raise ConfigError(msg)
        return getattr(self, part).copy()

    def changed(self, part: str = "answers") -> pd.DataFrame:
        """Return the rows whose interval of the difference excludes 0; raises `ConfigError` for a table without differences."""
        table: Any = self.frame(part)
        if "difference" not in table:
            msg = f"table '{part}' has no differences; choose from answers, probes, heads"
            raise ConfigError(msg)
        return table[(table["low"] > 0) | (table["high"] < 0)].reset_index(drop=True)

    def text(self) -> str:
        """Return a summary of the changes in a few lines."""
        lines = [f"{self.second} against {self.first}:"]
        for row in self.changed("answers").to_dict("records"):
            lines.append(
                f"  {row['measure']}: {100 * row['first']:.1f} % -> {100 * row['second']:.1f} % "
                f"({100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], n {row['n']})"
            )
        if len(lines) == 1:
            lines.append("  no metric of the answers changed beyond its interval")
        for part in ("probes", "heads"):
            table = self.frame(part)
            if len(table):
                lines.append(f"  {part}: {len(self.changed(part))} of {len(table)} changed beyond their interval")
        for row in self.ranking.to_dict("records"):
            lines.append(f"  heads for {row['kind']}: rank correlation {row['rank_correlation']:.2f}")
        transitions = [row for row in self.verdicts.to_dict("records") if row["first"] != row["second"]]
        for row in sorted(transitions, key=lambda row: -row["n"])[:5]:
            lines.append(f"  {format_count(row['n'], 'answer')}: {row['first']} -> {row['second']}")
        return "\n".join([*lines, *(f"  not compared: {note}" for note in self.notes)])

    def save(self, path: str | Path) -> Path:
        """Write one JSON file with a list of rows for each table; raises `StoreError` if it cannot be written."""
        tables = {
            part: json.loads(str(self.frame(part).to_json(orient="records", double_precision=15))) for part in PARTS
        }
        card = {"first": self.first, "second": self.second, "notes": list(self.notes)}
        provenance = json.loads(json.dumps(dict(self.provenance), default=str))
        document = artifacts.sign_document(FORMAT, VERSION, {**card, "provenance": provenance, **tables})
        artifacts.write_bytes(Path(path), (json.dumps(document, indent=1) + "\n").encode(), "model comparison")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; raises `StoreError` if it is missing, damaged, or another file."""
        import pandas as pd

        file = Path(path)
        document = artifacts.read_document(file, FORMAT, "model comparison", VERSION, advice="compare again")
        with building(f"{file} is a damaged model comparison", StoreError):
            tables: dict[str, Any] = {part: pd.DataFrame(document[part], columns=COLUMNS[part]) for part in PARTS}
            tables["probes"] = tables["probes"].astype({"head": "Int64"})
            return cls(
                str(document["first"]),
                str(document["second"]),
                **tables,
                notes=tuple(map(str, document["notes"])),
                provenance=dict(document["provenance"]),
            )


def compare_profiles(
    first: ModelProfile, second: ModelProfile, *, resamples: int = RESAMPLES, seed: int = 0
) -> ModelComparison:
    """Compare the profiles of two models; parts that only one has, or that differ in shape, are named in the notes.

    Parameters
    ----------
    first, second
        Profiles with answers to the same questions.
    resamples, seed
        Number of bootstrap resamples for heads, and their seed; differences of answers and probes have a closed form.

    Raises
    ------
    DataError
        If the two answered different questions.

    Examples
    --------
    >>> from behavior import Answer, BehaviorResult, Cost
    >>> from diagnosis import ModelProfile, compare_profiles
    >>> about = ("image", "neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    >>> answers = BehaviorResult((Answer("q", *about, "yes", True),), Cost(None, None, 1))
    >>> print(compare_profiles(ModelProfile("before", answers), ModelProfile("after", answers)).text())
    after against before:
      no metric of the answers changed beyond its interval
    """
    import pandas as pd

    notes: list[str] = []
    pairs = same_questions(first.answers, second.answers)
    heads, ranking = _heads(first.heads, second.heads, notes, resamples, seed)
    probes = pd.DataFrame(_probes(first.grids, second.grids, notes), columns=COLUMNS["probes"])
    return ModelComparison(
        first.name,
        second.name,
        pd.DataFrame(_answers(pairs), columns=COLUMNS["answers"]),
        probes.astype({"head": "Int64"}),
        heads,
        ranking,
        pd.DataFrame(_verdicts(first.diagnoses, second.diagnoses, notes), columns=COLUMNS["verdicts"]),
        tuple(notes),
        {"first": dict(first.provenance), "second": dict(second.provenance), "resamples": resamples, "seed": seed},
    )


Counts = Callable[[Answer], bool]


def _measures(answers: Sequence[Answer]) -> Iterator[tuple[str, Counts, Counts]]:
    """Yield name, denominator and numerator of each metric: all of `METRICS`, then accuracy by level, split and kind."""
    for name, metric in METRICS.usable().items():
        yield name, metric.applies, metric.counts
    for column in ("level", "split", "kind"):
        for value in dict.fromkeys(getattr(a, column) for a in answers):

            def counts(a: Answer, column: str = column, value: str = value) -> bool:
                return a.correct is not None and getattr(a, column) == value

            yield f"{column} {value}: right", counts, lambda a: bool(a.correct)


def _answers(pairs: Sequence[tuple[Answer, Answer]]) -> Iterator[dict[str, Any]]:
    for name, counts, value in _measures([a for a, _ in pairs]):
        both = [(a, b) for a, b in pairs if counts(a) and counts(b)]
        if not both:
            continue
        table = np.array([[bool(value(a)), bool(value(b))] for a, b in both], dtype=np.int64)
        change = table[:, 1] - table[:, 0]
        groups = [a.group for a, _ in both]
        low, high = change_interval(change, groups)
        gained, lost = int((change == 1).sum()), int((change == -1).sum())
        rates = {"first": float(table[:, 0].mean()), "second": float(table[:, 1].mean())}
        yield {
            "measure": name, "n": len(both), **rates, "difference": float(change.mean()), "low": low, "high": high,
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
        if (a.n_heads, a.heads) != (b.n_heads, b.heads) or not concepts or not layers:
            notes.append(f"probes {name}: the two have no common layers, heads and concepts")
            continue
        paired = a.held_out == b.held_out and np.array_equal(_labels(a, concepts), _labels(b, concepts), equal_nan=True)
        if not paired:
            notes.append(f"probes {name}: held-out examples differ, so the differences are not paired")
        for concept in concepts:
            # Common groups share an axis, because the scores of one image are correlated, paired or not.
            names = np.unique([*a.held_out_groups, *b.held_out_groups])
            scores = [_scores(grid, concept, layers, names) for grid in (a, b)]
            low, high = difference_interval(scores[1][1], scores[0][1])
            values = [score[0] for score in scores]
            for cell, (layer, head) in enumerate((i, h) for i in layers for h in a.head_numbers):
                yield {
                    "grid": name, "concept": concept, "layer": layer, "head": head if a.n_heads else None,
                    "first": values[0][cell], "second": values[1][cell],
                    "difference": values[1][cell] - values[0][cell], "low": low[cell], "high": high[cell],
                    "n": scores[0][2], "paired": paired,
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
            notes.append(f"heads for {kind}: {a.shape} and {b.shape} layers and heads cannot be compared")
            continue
        comparison = compare_rows(
            GroupedScores(b.effects, b.groups), GroupedScores(a.effects, a.groups), _TOP, resamples=resamples, seed=seed
        )
        for layer in range(a.shape[0]):
            for head in range(a.shape[1]):
                at = (layer, head)
                rows.append(
                    {
                        "kind": kind,
                        "name": f"L{layer}.H{head}",
                        "first": a.mean[at],
                        "second": b.mean[at],
                        "difference": comparison.difference[at],
                        "low": comparison.low[at],
                        "high": comparison.high[at],
                    }
                )
        overlaps = {f"overlap_{k}": comparison.overlap[k].value for k in _TOP}
        correlation = comparison.rank_correlation
        ends = {
            "rank_correlation": correlation.value,
            "rank_correlation_low": correlation.low,
            "rank_correlation_high": correlation.high,
        }
        ranks.append({"kind": kind, **ends, **overlaps, "shared_groups": comparison.groups[2]})
    return pd.DataFrame(rows, columns=COLUMNS["heads"]), pd.DataFrame(ranks, columns=COLUMNS["ranking"])


def _verdicts(first: Diagnoses | None, second: Diagnoses | None, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the number of common questions for each pair of verdicts."""
    if first is None or second is None:
        if first is not None or second is not None:
            notes.append("diagnoses: only one of the two has them")
        return
    verdicts = [{d.example["id"]: d.verdict or RIGHT for d in diagnoses.examples} for diagnoses in (first, second)]
    shared = [name for name in verdicts[0] if name in verdicts[1]]
    if not shared:
        notes.append("diagnoses: the two have no common question")
    for a in (RIGHT, *VERDICTS):
        for b in (RIGHT, *VERDICTS):
            n = sum(verdicts[0][name] == a and verdicts[1][name] == b for name in shared)
            if n:
                yield {"first": a, "second": b, "n": n}
