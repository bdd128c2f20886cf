"""Diagnose the wrong answers of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diagnosis import diagnose, fit_directions, select_evenly
from diagnosis.results import Diagnoses
from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.illustrate import illustrate_diagnoses
from groundscope.core.errors import GroundscopeError

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
    return f"{len(diagnoses.wrong)} wrong answers: {verdicts}{without}"


def _diagnose(context: Context) -> Diagnoses | None:
    """Diagnose wrong answers about images that no probe was fitted to; None if there are no such answers."""
    options, store = context.config.diagnose, context.store
    frame = store.frame()
    correct = dict(zip(frame["id"], frame["correct"], strict=True))
    directions = fit_directions(store, seed=options.seed)
    untrained = [e for e in context.discovery if e.id in correct and e.group not in directions.train_groups]
    examples = [e for e in untrained if len(e.images) == 1]  # the causes are about the one image of a question
    wrong = select_evenly([e for e in examples if correct[e.id] == 0], options.limit, seed=options.seed)
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
        seed=options.seed,
    )
    return replace(diagnoses, provenance={**diagnoses.provenance, "left_out": dict(directions.left_out)})
