"""Diagnose the wrong answers of a run."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from activation_store import trace
from diagnosis import DirectionSet, diagnose, exclude_images, fit_directions, measure_losses, select_evenly
from diagnosis.results import Diagnoses
from experiments.data import load_parts, probe_data
from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.illustrate import illustrate_diagnoses
from experiments.stages.trace import traced_sites
from groundscope.core.errors import GroundscopeError
from groundscope.core.text import format_count

SHOWN = 5
"""Concepts without a probe that the stage's message names; the result names all of them."""


def make_diagnoses(context: Context, root: Path) -> str:
    """Diagnose wrong answers to the discovery questions; a diagnosis that is impossible is reported, not raised."""
    options = context.config.diagnose
    try:
        diagnoses = _diagnose(context)
    except GroundscopeError as error:
        # Other data or fewer sites than usual: the rest of the run does not depend on it.
        write_json(root / "left_out.json", {"reason": str(error)})
        return f"nothing diagnosed: {error}"
    if diagnoses is None:
        reason = (
            "no wrong answers on images that the probes were not fitted to" if options.limit else "diagnose.limit=0"
        )
        write_json(root / "left_out.json", {"reason": reason})
        return f"nothing diagnosed: {reason}"
    diagnoses.save(root / "diagnoses.json")
    illustrate_diagnoses(context, root, diagnoses)
    counts: dict[str, int] = {}
    for item in diagnoses.wrong:
        counts[str(item.verdict)] = counts.get(str(item.verdict), 0) + 1
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items(), key=lambda item: -item[1]))
    missing = sorted(diagnoses.provenance.get("left_out", {}))
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    without = f"; no probe of {', '.join(missing[:SHOWN])}{more}" if missing else ""
    return f"{format_count(len(diagnoses.wrong), 'wrong answer')}: {verdicts}{without}"


def check(context: Context) -> None:
    """Raise `ConfigError` for wrong options of the data that probes are fitted to."""
    probe_data(context.config)


def _diagnose(context: Context) -> Diagnoses | None:
    """Diagnose wrong answers about images that no probe was fitted to; None if there are no such answers."""
    options, store = context.config.diagnose, context.store
    frame = store.frame()
    correct = dict(zip(frame["id"], frame["correct"], strict=True))
    directions, fitted_to = _fit(context)
    untrained = [e for e in context.discovery if e.id in correct and e.group not in directions.train_groups]
    examples = [e for e in untrained if len(e.images) == 1]  # the causes are about the one image of a question
    every_wrong = [e for e in examples if correct[e.id] == 0]
    wrong = select_evenly(every_wrong, options.limit, seed=options.seed)
    if not wrong:
        return None
    right = [e for e in examples if correct[e.id] == 1]
    diagnoses = diagnose(
        context.model,
        store,
        directions,
        [*wrong, *right],
        with_sources=options.sources,
        compare_ids=[e.id for e in select_evenly(right, options.compared, seed=options.seed)],
        calibrate_on=every_wrong,
        seed=options.seed,
    )
    diagnoses = measure_losses(store, diagnoses, seed=options.seed)
    about = {"left_out": dict(directions.left_out)} | ({"fitted_to": fitted_to} if fitted_to else {})
    return replace(diagnoses, provenance={**diagnoses.provenance, **about})


def _fit(context: Context) -> tuple[DirectionSet, str]:
    """Return the probes, and a description of the data if they are not those of the run."""
    options, store = context.config.diagnose, context.store
    if options.fit is None:
        return fit_directions(store, model=context.model, data=context.discovery, seed=options.seed), ""
    whole = load_parts(probe_data(context.config))[0]
    data = exclude_images(whole, context.discovery).filter(lambda e: len(e.candidates) > 1 and len(e.images) == 1)
    trace_options = context.config.trace
    with tempfile.TemporaryDirectory() as folder:
        other = trace(
            context.model,
            data,
            sites=traced_sites(trace_options),
            tokens=trace_options.tokens,
            out=Path(folder) / "store",
            batch_size=trace_options.batch_size,
            dtype=trace_options.dtype,
            heads=trace_options.heads,
        )
        everything = np.ones(len(other.frame()), bool)
        fitted = fit_directions(
            other, everything, model=context.model, data=data, without_boxes=True, seed=options.seed
        )
    # At the last token, kinds of questions that the other data do not have need probes of the run's own data.
    kinds = {d.kind for d in fitted if d.kind}
    own = [d for d in fit_directions(store, seed=options.seed) if d.kind and d.kind not in kinds]
    described = (
        f"{options.fit}: {format_count(len(data), 'question')} about "
        f"{format_count(len({e.group for e in data}), 'image')}"
    )
    return DirectionSet((*fitted, *own), fitted.left_out, fitted.train_images), described
