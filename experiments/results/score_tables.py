"""The tables of answers that a run prints and its report shows: as in papers, by data set and split."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.records import HEADLINE_RATES, read_record
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file

if TYPE_CHECKING:
    from behavior import BehaviorResult, BenchmarkTable

SHOWN = ("before", "after", "exportable", "twin")
"""Conditions whose tables are shown; those of the controls are in ``behavior/scores.json``."""
PRINTED = ("before", "after")
"""Conditions whose tables are printed."""
TITLES = {
    "before": "not steered",
    "after": "steered",
    "exportable": "steered, exportable vector",
    "twin": "control model",
}


def score_tables(run: Path, conditions: Sequence[str] = SHOWN) -> dict[str, BenchmarkTable]:
    """Return the tables of a run by condition, from the answers that it wrote; runs of earlier versions have them too."""
    from behavior import benchmark_table

    tables = {name: benchmark_table(result) for name, result in _results(run, conditions).items()}
    return {name: table for name, table in tables.items() if table.rows}


def describe_answers(run: Path) -> list[str]:
    """Return the tables of a run, and its scores of captions, as lines for the terminal."""
    from behavior import benchmark_table

    results = _results(run, PRINTED)
    tables = {name: table for name, result in results.items() if (table := benchmark_table(result)).rows}
    lines: list[str] = []
    for name, table in tables.items():
        title = f" ({TITLES[name]})" if len(tables) > 1 else ""
        lines += ["", f"answers to the test questions{title}, in percent:", *table.text().splitlines()]
        lines += _describe_seeds(results[name])
    if tables:
        lines.append(f"95 % intervals: {run / 'behavior' / 'scores.json'}")
    path = below(run, "behavior/rates.json", error=ConfigError)
    rates = read_record(path, HEADLINE_RATES) if is_file(path) else {}
    captions = {c: {n: r for n, r in rates[c].items() if "caption: " in n} for c in PRINTED if c in rates}
    for condition, scores in captions.items():
        if scores:
            figures = ", ".join(
                f"{name.replace('caption: ', '')} {100 * rate['value']:.1f}" for name, rate in scores.items()
            )
            lines.append(f"captions ({TITLES[condition]}), in percent: {figures}")
    return lines


def _describe_seeds(answers: BehaviorResult) -> list[str]:
    """Return the accuracy of each seed as a line; empty for answers of one seed."""
    from behavior.repeated_sampling import divide_seeds

    rates = [100 * part.rate("accuracy").value for part in divide_seeds(answers)]
    if len(rates) < 2:
        return []
    deviation = statistics.stdev(rates)
    values = ", ".join(f"{rate:.1f}" for rate in rates)
    return [
        f"accuracy of each of {len(rates)} seeds: {values} (mean {statistics.mean(rates):.1f}, deviation {deviation:.1f})"
    ]


def _results(run: Path, conditions: Sequence[str]) -> dict[str, BehaviorResult]:
    from behavior import BehaviorResult

    paths = {name: below(run, f"behavior/{name}.json", error=ConfigError) for name in conditions}
    return {name: BehaviorResult.load(path) for name, path in paths.items() if is_file(path)}


def write_scores(path: Path, results: dict[str, BehaviorResult]) -> None:
    """Write the table of each condition as JSON."""
    from behavior import benchmark_table
    from groundscope.core.files import write_text

    records = {name: benchmark_table(result).records() for name, result in results.items()}
    write_text(path, json.dumps(records, indent=1, allow_nan=False) + "\n")


def describe_card(run: Path) -> list[str]:
    """Return the totals of a run's evaluation card as lines for the terminal."""
    from behavior.card import EvaluationCard, card_text, ranking_lines

    card = EvaluationCard.load(below(run, "card/card.json", error=ConfigError))
    return [
        "",
        "wrong answers in percent; severity: the weight of wrong answers under a profile (same: all weights are equal):",
        *card_text(card).splitlines(),
        *ranking_lines(card),
        f"the card: {run / 'card' / 'card.html'}",
    ]


def describe_representation(run: Path) -> list[str]:
    """Return the main results on representation and behavior as lines for the terminal."""
    from diagnosis import RepresentationStudy

    study = RepresentationStudy.load(below(run, "representation", error=ConfigError))
    return ["", *study.text().splitlines(), f"all figures: {run / 'representation'}"]


def describe_arena(run: Path) -> list[str]:
    """Return the table of a run's arena as lines for the terminal."""
    from mitigation.arena.result import ArenaResult
    from mitigation.arena.tables import as_text

    arena = ArenaResult.load(below(run, "arena/arena.json", error=ConfigError))
    return [
        "",
        *as_text(arena, brief=True).splitlines(),
        "",
        "+ better, - worse than the model alone beyond an interval that holds for all rows together",
        f"all figures: {run / 'arena' / 'arena.csv'}",
    ]
