"""The stages of a run, in order: one entry of `TABLE` per stage.

A stage's function gets the context of the run and the folder of the stage, writes its files there, and returns a one-line
summary. Functions are imported when they are called: a command that only reads imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experiments.config import STAGES, RunConfig, key_options
from experiments.run.context import ACTIVATIONS, Context
from experiments.run.folder import file_digest
from experiments.stages.stage import Stage


def _function(target: str) -> Callable[..., Any]:
    """Return a function that imports ``module.function`` of this package and calls it."""
    module, _, name = target.partition(".")

    def call(*arguments: object) -> Any:
        return getattr(import_module(f"experiments.stages.{module}"), name)(*arguments)

    return call


def _trace_options(context: Context) -> object:
    # The numbers of parts and files change neither rows nor values.
    options = key_options("trace", asdict(context.config.trace))
    options = {k: v for k, v in options.items() if k not in {"shards", "shard", "shard_size"}}
    return [options, context.model_key()]


def _evaluate_options(context: Context) -> object:
    from behavior.chair import read_synonyms

    options = key_options("evaluate", asdict(context.config.evaluate))
    file = options.pop("synonyms")  # without it the key is the one of runs that had no such option
    words = {} if file is None else {"synonyms": sorted(read_synonyms(file).items())}
    return [options | words, context.model_key()]


def applies_vectors(config: RunConfig) -> bool:
    """Return whether the conditions of `evaluate` include the correction or its controls, which stage `steer` makes."""
    conditions = config.evaluate.conditions
    return conditions is None or not set(conditions) <= {"before", "twin"}


def needed_stages(name: str, context: Context) -> tuple[str, ...]:
    """Return the stages that a stage needs with the options of a run."""
    spared = TABLE[name].spared(context)
    return tuple(n for n in TABLE[name].needs if n not in spared)


def _missing(context: Context) -> list[str]:
    """Return the stages without results, which have not run and do not run now: the report has no sections for them."""
    runs = context.config.stages
    return [s for s in STAGES if s not in runs and s != "examples" and context.folder.receipt(TABLE[s].folder) is None]


def _arena_options(context: Context) -> object:
    options = asdict(context.config.arena)
    files = {name: file_digest(Path(file)) for name, file in options["answer_files"].items()}
    return [options | {"answer_files": files}, context.model_key(), context.held_out.digest]


def _arena_spares(context: Context) -> tuple[str, ...]:
    """Return the stages that no method of the arena needs."""
    methods = context.config.arena.methods
    if methods is None:
        return ("trace", "patch")
    from mitigation.arena.rows import row_needs

    needs = {need for text in methods for need in row_needs(text)}
    return tuple(stage for stage, need in (("trace", "store"), ("patch", "heads")) if need not in needs)


def _card_options(context: Context) -> object:
    options = asdict(context.config.card)
    files = {name: file_digest(Path(file)) for name, file in options["answer_files"].items()}
    files |= {f"safety {name}": file_digest(Path(file)) for name, file in options["safety"].items()}
    asked: list[object] = []
    for number, entry in enumerate(options["benchmarks"]):
        named = {"answers": entry.get("answers"), "verdicts": entry.get("verdicts"), **(entry.get("files") or {})}
        if entry.get("images"):  # the model of the run writes the answers; the questions have a digest
            from experiments.stages.card_benchmarks import questions_digest

            named = {"verdicts": entry.get("verdicts")}
            asked.append([questions_digest(number, entry, context), context.model_key()])
        for role, file in named.items():
            for path in _plain_files(file):
                files[f"benchmark {number} {role} {path.name}"] = file_digest(path)
    return [options, files, context.held_out.digest, *asked]


def _plain_files(file: object) -> list[Path]:
    """Return a file, or the files of a folder."""
    if file is None:
        return []
    path = Path(str(file))
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def _diagnose_options(context: Context) -> object:
    from experiments.data import load_parts, probe_data

    options = asdict(context.config.diagnose)
    if options["fit"] is None:  # the key of runs that had no such options
        options = {name: value for name, value in options.items() if not name.startswith("fit")}
        return [options, context.model_key()]
    return [options, load_parts(probe_data(context.config))[0].digest, context.model_key()]


TABLE: Mapping[str, Stage] = MappingProxyType(
    {
        "examples": Stage(
            "examples",
            needs=(),
            options=lambda c: [key_options("data", asdict(c.config.data)), c.discovery.digest, c.held_out.digest],
            work=_function("examples.make_examples"),
            version=2,
        ),
        "trace": Stage(
            ACTIVATIONS,
            needs=("examples",),
            options=_trace_options,
            work=_function("trace.make_activations"),
            version=3,
        ),
        "probe": Stage(
            "probes",
            needs=("trace",),
            options=lambda c: key_options("probe", asdict(c.config.probe)),
            work=_function("probe.make_probes"),
            version=3,
            check=_function("probe.check"),
        ),
        "patch": Stage(
            "circuits",
            needs=("examples",),
            options=lambda c: [key_options("patch", asdict(c.config.patch)), c.model_key()],
            work=_function("patch.make_head_scores"),
            version=4,
            check=_function("patch.check"),
        ),
        "steer": Stage(
            "steering",
            needs=("examples", "trace", "patch"),
            options=lambda c: [asdict(c.config.steer), c.model_key()],
            work=_function("steer.make_steering"),
            version=6,
            check=_function("steer.check"),
        ),
        "evaluate": Stage(
            "behavior",
            needs=("examples", "steer"),
            spared=lambda c: () if applies_vectors(c.config) else ("steer",),
            options=_evaluate_options,
            work=_function("evaluate.make_behavior"),
            version=4,
            check=_function("evaluate.check"),
        ),
        "diagnose": Stage(
            "diagnosis",
            needs=("examples", "trace"),
            options=_diagnose_options,
            work=_function("diagnose.make_diagnoses"),
            version=6,
            check=_function("diagnose.check"),
        ),
        "representation": Stage(
            "representation",
            needs=("examples", "trace"),
            options=lambda c: [asdict(c.config.representation), c.model_key()],
            work=_function("representation.make_representation"),
            check=_function("representation.check"),
        ),
        "export": Stage(
            "export",
            needs=("steer",),
            options=lambda c: [asdict(c.config.export), c.model_key()],
            work=_function("export.make_exports"),
            version=3,
            check=_function("export.check"),
        ),
        "arena": Stage(
            "arena",
            needs=("examples", "trace", "patch"),
            spared=_arena_spares,
            options=_arena_options,
            work=_function("arena.make_arena"),
            check=_function("arena.check"),
        ),
        "card": Stage(
            "card",
            needs=("examples", "evaluate"),
            spared=lambda c: ("examples", "evaluate") if c.config.card.conditions == [] else (),
            options=_card_options,
            work=_function("card.make_card"),
            check=_function("card.check"),
        ),
        "report": Stage(
            "report",
            needs=tuple(stage for stage in STAGES if stage != "report"),
            options=lambda c: [asdict(c.config.report), c.headline(), c.config.diagnose.shown, c.config.steer.max_drop],
            work=_function("report.make_report"),
            spared=_missing,
            version=4,
            shared=False,
            illustrated=True,
            outside=("report.html",),
        ),
    }
)
"""Stage to its entry, in the order they run."""
