"""Stage `card`: the evaluation card of the run's conditions, of answers of other models, and of benchmarks' answer files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from behavior.answer_files import load_answers
from behavior.card import Profile, evaluation_card, facts_of, named_profiles, read_safety, reword, share_text
from behavior.card.card import Scored
from behavior.card.profiles import check_profiles
from behavior.card.rewording import check_rules
from behavior.result import BehaviorResult
from concepts.combination import dataset_parts
from concepts.schema import ConceptDataset
from diagnosis import select_evenly
from experiments.config import CardConfig
from experiments.data import is_scenes
from experiments.run.context import Context
from experiments.stages.card_benchmarks import ask_model, check_entries, model_of, scores_of_files
from experiments.stages.evaluate import RUNS
from groundscope.core.errors import ConfigError
from groundscope.core.statistics import Estimate
from groundscope.core.text import format_count, nearest
from mitigation.steering.vector import SteeringVector

RESULT = "card.json"
CONDITIONS = ("before", "after", "twin")
"""Conditions of the card if none are chosen."""


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
    if options.reworded < 0:
        msg = f"card.reworded={options.reworded}: must be at least 0"
        raise ConfigError(msg)
    check_rules(options.rewordings or ())
    profiles_of(options)
    check_entries(context)
    answers = answers_of_files(context)
    local = options.conditions != []
    if not local and not options.benchmarks and not answers:
        msg = "card.conditions=[] without answer files or benchmarks leaves no model; give card.answer_files or card.benchmarks"
        raise ConfigError(msg)
    models = {
        *answers,
        *(model_of(entry, context) for entry in options.benchmarks),
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
    """Return the answers to the test questions that other models gave; the files are read once in a run."""
    files = context.config.card.answer_files
    return context.once(
        "card: answer files", lambda: {name: load_answers(context.held_out, file) for name, file in files.items()}
    )


def make_card(context: Context, root: Path) -> str:
    """Make the card; write its files."""
    options = context.config.card
    data = context.held_out
    models: dict[str, dict[str, Scored]] = {}
    reworded: dict[str, dict[str, Mapping[str, Estimate]]] = {}
    for condition, answers in _conditions(context).items():
        name = context.config.model.path if condition == "before" else f"{context.config.model.path}, {condition}"
        models.setdefault(name, {}).update(_by_part(answers, context))
        reworded[name] = _reword(condition, answers, context)
    for name, answers in answers_of_files(context).items():
        models.setdefault(name, {}).update(_by_part(answers, context))
    benchmark_scores, waiting = ask_model(context)
    for source in (scores_of_files(context), benchmark_scores):
        for name, scores in source.items():
            models.setdefault(name, {}).update(scores)
    if not models:
        msg = f"no answers of the card can be scored yet. {'; '.join(waiting)}"
        raise ConfigError(msg)
    card = evaluation_card(
        models,
        data=dict(dataset_parts(data)),
        profiles=profiles_of(options),
        facts=facts_of(data),
        safety={name: read_safety(file) for name, file in options.safety.items()},
        reworded=reworded,
        differences=options.differences,
    )
    card = replace(card, provenance={**card.provenance, "about": _about(context)})
    card.save(root)
    for line in waiting:
        context.console.print(f"not scored yet: {line}", markup=False)
    first = next(row for row in card.rows if row.level == "all" and row.task == "all")
    return (
        f"{format_count(len(card.models), 'model')}, {format_count(len(card.benchmarks), 'benchmark')}; {first.model}: "
        f"{share_text(first.frequency)} % wrong"
    )


def _about(context: Context) -> dict[str, str]:
    """Return what each part of the run's test data is."""
    kind = "synthetic icon scene" if is_scenes(context.config.data) else "image"
    return {
        name: f"{format_count(len(part), 'test question')} about {format_count(len({e.group for e in part}), kind)}"
        for name, part in dataset_parts(context.held_out).items()
    }


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


def _reword(condition: str, answers: BehaviorResult, context: Context) -> dict[str, Mapping[str, Estimate]]:
    """Ask the model of a condition in other words, and return the rates of changed answers by part of the data."""
    options = context.config.card
    vector = context.folder.path / "steering" / "vector.safetensors"
    if not options.reworded or condition not in CONDITIONS or not context.has_model_files():
        return {}
    model = context.twin if condition == "twin" else context.model
    if model is None or (condition == "after" and not vector.is_file()):
        return {}
    corrected = SteeringVector.load(vector).applied(model) if condition == "after" else nullcontext()
    rates = {}
    with corrected:
        for name, part in dataset_parts(context.held_out).items():
            chosen = select_evenly([e for e in part if e.candidates], options.reworded)
            data = ConceptDataset(name, tuple(chosen))
            result = reword(
                model, data, answers, rules=options.rewordings, batch_size=context.config.evaluate.batch_size
            )
            rates[name] = result.rates
            for rule, reason in result.left_out.items():
                context.console.print(f"not asked: rewording '{rule}' of {name}, {condition}: {reason}", markup=False)
    return rates


def _by_part(answers: BehaviorResult, context: Context) -> dict[str, Scored]:
    """Return the answers to each part of the data, by its name."""
    parts = dataset_parts(context.held_out)
    ids = {name: {e.id for e in part} for name, part in parts.items()}
    return {
        name: BehaviorResult(tuple(a for a in answers.answers if a.id in ids[name]), answers.cost, answers.provenance)
        for name in parts
        if any(a.id in ids[name] for a in answers.answers)
    }
