"""Stage `probe`: a grid of linear probes for each array of the store and its concepts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.data import is_scenes
from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.trace import traced_examples
from groundscope.core.errors import ConfigError, ProbeError
from groundscope.core.text import nearest


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
    fitted, done, left_out = 0, [], {}
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
    if left_out:
        name, reason = next(iter(left_out.items()))
        write_json(root / "left_out.json", {"reason": reason, "grids": left_out})
        if not done:
            return f"left out: {reason}; {more_data(context)}"
        return f"{fitted} probes and as many controls in {len(done)} grids; left out: {len(left_out)}, {name}: {reason}"
    return f"{fitted} probes and as many controls in {len(done)} grids"


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
    missing = next((c for c in concepts if c not in labels), None)
    if missing is not None:
        msg = f"concept '{missing}' is not in the data; choose from {', '.join(labels)}{nearest(missing, labels)}"
        raise ConfigError(msg)
