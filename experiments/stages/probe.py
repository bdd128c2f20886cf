"""Stage `probe`: a grid of linear probes for each array of the store and its concepts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.concept import Concept
from experiments.data import is_scenes
from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.trace import traced_examples
from groundscope.core.errors import ConfigError, ProbeError
from groundscope.core.text import format_count, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probes import GridPlan


def make_probes(context: Context, root: Path) -> str:
    """Fit a grid of probes for each array of the store and its concepts."""
    from probes import fit_grid, plan_grids

    options = context.config.probe
    frame: Any = context.store.frame()
    # Misleading splits are excluded: probes must not learn the truth from the model's errors.
    rows = frame["split"].isin(["neutral"]) if (frame["split"] == "neutral").any() else frame["split"].notna()
    mask = rows.to_numpy()
    split: Any = {"folds": options.folds, "test_fraction": options.test_fraction, "rows": mask}
    plan = plan_grids(context.store, options.concepts, **split)
    if not plan:
        reason = f"no concept has enough images of both classes to fit a probe: {more_data(context)}"
        write_json(root / "left_out.json", {"reason": reason})
        write_json(root / "plan.json", [])
        return f"left out: {reason}"
    fitted, done = 0, []
    left_out = _unsupported(frame[mask], options.folds, options.test_fraction) if options.concepts is None else {}
    for entry in plan:
        try:
            grid = fit_grid(
                context.store,
                entry.concepts,
                entry.site,
                tokens=entry.tokens,
                C=options.C,
                skip_unplaceable=True,
                seed=options.seed,
                **split,
            )
        except ProbeError as error:  # none of the concepts can be fitted to these images
            left_out[entry.name] = str(error)
            continue
        unplaced = grid.provenance.get("left_out", {})
        left_out |= {f"{concept} in {entry.name}": reason for concept, reason in unplaced.items()}
        grid.save(root / entry.name)
        fitted += grid.balanced_accuracy.size
        done.append(replace(entry, concepts=grid.concepts))
    write_json(root / "plan.json", [asdict(entry) for entry in done])
    _score_classes(context, root, done, mask)
    if left_out:
        name, reason = next(iter(left_out.items()))
        write_json(root / "left_out.json", {"reason": reason, "grids": left_out})
        if not done:
            return f"left out: {reason}; {more_data(context)}"
        return (
            f"{format_count(fitted, 'probe')} and as many controls in {format_count(len(done), 'grid')}; left out: "
            f"{len(left_out)}, {name}: {reason}"
        )
    return f"{format_count(fitted, 'probe')} and as many controls in {format_count(len(done), 'grid')}"


def _unsupported(frame: Any, folds: int, test_fraction: float) -> dict[str, str]:
    """Return why labels of the user's own cannot be probed, by label."""
    from probes.protocol.inputs import concept_columns, read_groups
    from probes.protocol.splits import groups_needed, support_problem

    groups, needed = read_groups(frame), groups_needed(folds, test_fraction)
    free = [c for c in concept_columns(frame) if not Concept.parse(c).level]
    problems = {c: support_problem(c, frame[c].to_numpy(dtype=np.float64), groups, needed) for c in free}
    return {c: problem for c, problem in problems.items() if problem}


def _score_classes(context: Context, root: Path, plan: Sequence[GridPlan], rows: np.ndarray) -> None:
    """Write the scores of softmax probes among the classes of each label column of the user, for grids of whole layers."""
    from probes import ProbeGrid, multiclass

    records = []
    for entry in plan:
        grid = ProbeGrid.load(root / entry.name)
        free = [c for c in grid.concepts if not Concept.parse(c).level and ":" in c]
        for column in dict.fromkeys(c.partition(":")[0] for c in free):
            classes = [c for c in free if c.startswith(f"{column}:")]
            if len(classes) < 2 or grid.n_heads:
                continue
            try:
                scores = multiclass(grid, classes, how="softmax", store=context.store, rows=rows)
            except ProbeError as error:  # two columns that are not exclusive, or too few rows of a class
                records.append({"grid": entry.name, "column": column, "reason": str(error)})
                continue
            for score in scores.drop(columns="head").to_dict("records"):
                records.append({"grid": entry.name, "column": column, "classes": classes, **score})
    if records:
        write_json(root / "classes.json", records)


def more_data(context: Context) -> str:
    """Return the options of the configured data that give more discovery images."""
    data = context.config.data
    if is_scenes(data):
        return f"draw more scenes, with data.n_images above {data.n_images}"
    limited = f"raise data.limit={data.limit}, or " if data.limit is not None else ""
    return f"{limited}add questions on more images (data.questions, data.images), or lower data.test_share={data.test_share:g}"


def check(context: Context) -> None:
    """Raise `ConfigError` for a concept that the data do not have."""
    concepts = context.config.probe.concepts
    if concepts is None:
        return
    labels = list(dict.fromkeys(c for e in traced_examples(context) for c in e.labels))
    columns = {c.partition(":")[0] for c in labels if not Concept.parse(c).level}
    missing = next((c for c in concepts if c not in labels and c not in columns), None)
    if missing is not None:
        msg = f"concept '{missing}' is not in the data; choose from {', '.join(labels)}{nearest(missing, labels)}"
        raise ConfigError(msg)
