"""Stage `evaluate`: answers to the test questions without steering, with steering, with controls, and of the twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behavior import ImageAnnotation, answer, score_descriptions, write_descriptions
from behavior.chair import read_synonyms
from behavior.free_text.annotations import annotation_of, examples_by_image
from behavior.metrics import METRICS, compare_metric, compute_metrics
from behavior.score_names import FIRST_TOKEN
from concepts.schema import ConceptDataset
from experiments.config import EvaluateConfig
from experiments.results.score_tables import write_scores
from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.illustrate import illustrate_prior_error
from experiments.stages.registry import needed_stages
from experiments.stages.steer import EXPORTABLE, control_file
from groundscope.core.errors import ConfigError
from groundscope.core.text import format_count, nearest
from mitigation import CONTROLS, SteeringVector
from mitigation.free_text_prompts import FreeTextPrompts, caption_prompts, plain_texts
from mitigation.guard import guard_limits, guards
from mitigation.guard_loss import measure_guards, not_measured
from mitigation.model_outputs import ModelOutputs, combine_outputs
from mitigation.strength import PRIOR_ERRORS, answer_under

if TYPE_CHECKING:
    from behavior import BehaviorResult
    from lvlm import Sampling

DESCRIPTIONS = "descriptions-"
"""Start of the names of the files with judged captions."""
RUNS = ("before", "after", "exportable", *CONTROLS, "twin")
"""All conditions under which the test questions are answered."""


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown condition, or a file of synonyms that cannot be read or has no effect."""
    for name in context.config.evaluate.conditions or ():
        if name not in RUNS:
            msg = f"evaluate.conditions: unknown condition '{name}'; choose from {', '.join(RUNS)}{nearest(name, RUNS)}"
            raise ConfigError(msg)
    file, source = context.config.evaluate.synonyms, context.config.data.source
    if file is not None and "coco" not in (source if isinstance(source, list) else [source]):
        msg = f"evaluate.synonyms={file}: captions of data={source} are scored without it; use data=coco, or remove the option"
        raise ConfigError(msg)
    if file is not None:
        read_synonyms(file)
    options = context.config.evaluate
    if options.score != FIRST_TOKEN and not any(e.candidates for e in context.held_out):
        msg = (
            f"evaluate.score={options.score} has no effect: no question of these data has candidates; add data.choices=[…], or "
            "remove the option"
        )
        raise ConfigError(msg)
    written = options.generate or any(not e.candidates for e in context.held_out)
    if options.temperature > 0 and not written:
        msg = (
            f"evaluate.temperature={options.temperature:g}: every question of these data has candidates, so no answer is "
            "written; add evaluate.generate=true"
        )
        raise ConfigError(msg)


def _sampling(options: EvaluateConfig) -> Sampling | None:
    if options.temperature == 0:
        return None
    from lvlm import Sampling

    return Sampling(options.temperature, options.top_p, options.seed)


def chosen_conditions(context: Context) -> list[str]:
    """Return the conditions of the configuration in order, and always ``before``, with which the others are compared."""
    chosen = context.config.evaluate.conditions
    return [run for run in RUNS if chosen is None or run == "before" or run in chosen]


def make_behavior(context: Context, root: Path) -> str:
    """Answer the test questions under each condition; write answers, rates and paired differences."""
    steering = context.folder.path / "steering"
    files = {"after": "vector.safetensors", "exportable": EXPORTABLE, **{name: control_file(name) for name in CONTROLS}}
    with_vectors = "steer" in needed_stages("evaluate", context)
    data = context.held_out
    conditions = chosen_conditions(context)
    options = context.config.evaluate
    vectors: dict[str, SteeringVector | None] = {"before": None}
    vector_files = {run: steering / file for run, file in files.items() if with_vectors and (steering / file).exists()}
    vectors |= {run: SteeringVector.load(path) for run, path in vector_files.items() if run in conditions}
    same = ("batch_size", "generate", "score", "parser", "match", "max_new_tokens", "seeds")
    answering: Any = {name: getattr(options, name) for name in same} | {"sampling": _sampling(options)}
    results = answer_under(context.model, data, vectors, **answering)
    if context.twin is not None and "twin" in conditions:
        results["twin"] = answer(context.twin, data, **answering)
    for run, result in results.items():
        result.save(root / f"{run.replace(' ', '-')}.json")
    synonyms = None if options.synonyms is None else read_synonyms(options.synonyms)
    rates = {run: compute_metrics(result, data, synonyms=synonyms) for run, result in results.items()}
    write_json(
        root / "rates.json", {run: {k: asdict(v) for k, v in measures.items()} for run, measures in rates.items()}
    )
    changes = {
        run: {
            name: asdict(change)
            for name in rates["before"]
            if name in METRICS and (change := compare_metric(results["before"], results[run], name)) is not None
        }
        for run in results
        if run not in {"before", "twin"}
    }
    write_json(root / "changes.json", changes)
    write_scores(root / "scores.json", results)
    _write_descriptions(root, results, data)
    _measure_guards(context, root, results, vectors)
    if with_vectors:  # else the run may have no activations
        illustrate_prior_error(context, root, vectors.get("after"), twin="twin" in results)
    names = [n for n in (*PRIOR_ERRORS, "neutral: right", "all: right") if n in rates["before"]]
    if not names:
        return f"{format_count(len(data), 'answer')}"
    after = {n: f" -> {rates['after'][n].value:.3f}" if "after" in rates else "" for n in names}
    return f"{format_count(len(data), 'question')}; " + "; ".join(
        f"{n} {rates['before'][n].value:.3f}{after[n]}" for n in names[:3]
    )


def _write_descriptions(root: Path, results: Mapping[str, BehaviorResult], data: ConceptDataset) -> None:
    """Write the captions of each condition with judged objects, attributes and relations, if the data have captions."""
    annotations: dict[str, ImageAnnotation] = {}
    for examples in examples_by_image(data):
        requests = [example.id for example in examples if example.kind == "caption"]
        if requests:
            annotations |= dict.fromkeys(requests, annotation_of(examples))
    for run, result in results.items():
        texts = {name: text for name, text in result.texts.items() if name in annotations}
        if texts:
            scores = score_descriptions(texts, annotations)
            write_descriptions(scores.descriptions, root / f"{DESCRIPTIONS}{run.replace(' ', '-')}.jsonl")
            write_json(
                root / f"{DESCRIPTIONS}{run.replace(' ', '-')}.json", {row.level: asdict(row) for row in scores.levels}
            )


def _measure_guards(
    context: Context,
    root: Path,
    results: Mapping[str, BehaviorResult],
    vectors: Mapping[str, SteeringVector | None],
) -> None:
    """Write what the vectors cost on the test images: each guard before and after, with intervals, and what was not measured."""
    corrected = [run for run in ("after", "exportable") if vectors.get(run) is not None]
    if not corrected:
        return
    model, data, options = context.model, context.held_out, context.config.steer
    # Captions of the data have been written with the answers.
    captions = ConceptDataset("no captions", ()) if any(e.kind == "caption" for e in data) else caption_prompts(data)
    prompts = FreeTextPrompts(captions, plain_texts(model, data))
    outputs = {
        run: combine_outputs(ModelOutputs(data, results[run]), prompts.outputs(model, vectors[run]))
        for run in ("before", *corrected)
    }
    measured = {run: measure_guards(outputs["before"], outputs[run]) for run in corrected}
    record = {
        "conditions": {run: {name: asdict(r) for name, r in rows.items()} for run, rows in measured.items()},
        "labels": {name: guard.label for name, guard in guards.usable().items()},
        "limits": guard_limits(options.guards, options.max_drop),
        "not_measured": not_measured(outputs["before"]),
    }
    write_json(root / "guards.json", record)
