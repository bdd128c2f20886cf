"""Stage `card`: the evaluation card of the run's conditions, of answers of other models, and of benchmarks' answer files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from behavior.answer_files import load_answers
from behavior.benchmarks import BENCHMARKS, BenchmarkScore, score_files
from behavior.card import Profile, evaluation_card, facts_of, named_profiles, read_safety
from behavior.card.card import Scored
from behavior.card.page import share_text
from behavior.card.profiles import check_profiles
from behavior.result import BehaviorResult
from concepts.combination import dataset_parts
from experiments.config import CardConfig
from experiments.run.context import Context
from experiments.stages.evaluate import RUNS
from groundscope.core.errors import ConfigError
from groundscope.core.text import format_count, nearest

RESULT = "card.json"
CONDITIONS = ("before", "after", "twin")
"""Conditions of the card if none are chosen."""
_ENTRY = ("model", "benchmark", "label", "answers", "files", "verdicts", "variant", "format", "by_place")
_NEEDED = ("model", "benchmark", "answers")


def check(context: Context) -> None:
    """Raise an error for an unknown condition, profile, benchmark or model, or a file that cannot be read or scored."""
    options = context.config.card
    for name in options.conditions or ():
        if name not in RUNS:
            msg = f"card.conditions: unknown condition '{name}'; choose from {', '.join(RUNS)}{nearest(name, RUNS)}"
            raise ConfigError(msg)
    if options.differences not in {"first", "all"}:
        msg = f"card.differences={options.differences}: choose from first, all"
        raise ConfigError(msg)
    profiles_of(options)
    scores = benchmark_scores(options)
    answers = answers_of_files(context)
    local = options.conditions != []
    if not local and not scores and not answers:
        msg = "card.conditions=[] without answer files or benchmarks leaves no model; give card.answer_files or card.benchmarks"
        raise ConfigError(msg)
    models = {
        *answers,
        *(str(entry["model"]) for entry in options.benchmarks),
        *([context.config.model.path] if local else []),
    }
    for model, file in options.safety.items():
        if model not in models and not (local and model.startswith(f"{context.config.model.path}, ")):
            msg = f"card.safety: no model '{model}' in the card{nearest(model, models)}"
            raise ConfigError(msg)
        read_safety(file)


def profiles_of(options: CardConfig) -> dict[str, Profile]:
    """Return the severity profiles of a configuration."""
    named = named_profiles(options.profiles)
    own = {name: dict(weights) for name, weights in options.weights.items()}
    return check_profiles(
        None if named is None and not own else {**(check_profiles(None) if named is None else named), **own}
    )


def answers_of_files(context: Context) -> dict[str, BehaviorResult]:
    """Return the answers to the test questions that other models gave."""
    return {name: load_answers(context.held_out, file) for name, file in context.config.card.answer_files.items()}


def benchmark_scores(options: CardConfig) -> dict[str, dict[str, BenchmarkScore]]:
    """Return the scores of benchmarks' answer files by model and benchmark."""
    scores: dict[str, dict[str, BenchmarkScore]] = {}
    for number, entry in enumerate(options.benchmarks):
        _check_entry(number, entry)
        label = str(entry.get("label") or entry["benchmark"])
        if label in scores.get(str(entry["model"]), {}):
            msg = f"card.benchmarks: model '{entry['model']}' has two entries '{label}'; give one of them a label"
            raise ConfigError(msg)
        scores.setdefault(str(entry["model"]), {})[label] = score_files(
            str(entry["benchmark"]),
            str(entry["answers"]),
            files=entry.get("files") or {},
            verdicts=entry.get("verdicts"),
            variant=entry.get("variant"),
            format=entry.get("format"),
            by_place=bool(entry.get("by_place")),
        )
    return scores


def _check_entry(number: int, entry: Mapping[str, Any]) -> None:
    where = f"card.benchmarks, entry {number + 1}"
    unknown = next((name for name in entry if name not in _ENTRY), None)
    if unknown is not None:
        msg = f"{where}: unknown field '{unknown}'; choose from {', '.join(_ENTRY)}{nearest(str(unknown), _ENTRY)}"
        raise ConfigError(msg)
    lacking = next((name for name in _NEEDED if not entry.get(name)), None)
    if lacking is not None:
        msg = f"{where}: '{lacking}' is missing; an entry needs {', '.join(_NEEDED)}"
        raise ConfigError(msg)
    BENCHMARKS[str(entry["benchmark"])]  # raises for an unknown name


def make_card(context: Context, root: Path) -> str:
    """Make the card; write its files."""
    options = context.config.card
    data = context.held_out
    models: dict[str, dict[str, Scored]] = {}
    for condition, answers in _conditions(context).items():
        name = context.config.model.path if condition == "before" else f"{context.config.model.path}, {condition}"
        models.setdefault(name, {}).update(_by_part(answers, context))
    for name, answers in answers_of_files(context).items():
        models.setdefault(name, {}).update(_by_part(answers, context))
    for name, scores in benchmark_scores(options).items():
        models.setdefault(name, {}).update(scores)
    card = evaluation_card(
        models,
        data=dict(dataset_parts(data)),
        profiles=profiles_of(options),
        facts=facts_of(data),
        safety={name: read_safety(file) for name, file in options.safety.items()},
        differences=options.differences,
    )
    card.save(root)
    first = next(row for row in card.rows if row.level == "all" and row.task == "all")
    return (
        f"{format_count(len(card.models), 'model')}, {format_count(len(card.benchmarks), 'benchmark')}; {first.model}: "
        f"{share_text(first.frequency)} % wrong"
    )


def _conditions(context: Context) -> dict[str, BehaviorResult]:
    chosen = context.config.card.conditions
    folder = context.folder.path / "behavior"
    results = {}
    for name in CONDITIONS if chosen is None else chosen:
        path = folder / f"{name.replace(' ', '-')}.json"
        if path.is_file():
            results[name] = BehaviorResult.load(path)
        elif chosen is not None:
            msg = f"card.conditions: the run has no answers of condition '{name}'; add it to evaluate.conditions"
            raise ConfigError(msg)
    return results


def _by_part(answers: BehaviorResult, context: Context) -> dict[str, Scored]:
    """Return the answers to each part of the data, by its name."""
    parts = dataset_parts(context.held_out)
    ids = {name: {e.id for e in part} for name, part in parts.items()}
    return {
        name: BehaviorResult(tuple(a for a in answers.answers if a.id in ids[name]), answers.cost, answers.provenance)
        for name in parts
        if any(a.id in ids[name] for a in answers.answers)
    }
