"""Stage `representation`: alignment, information along the path, and ceilings of behavior on the run's own questions."""

from __future__ import annotations

from pathlib import Path

from diagnosis import study_representation
from experiments.run.context import Context
from groundscope.core.errors import ConfigError
from groundscope.core.text import format_count
from probes import predictive_families
from probes.alignment.comparison import PERMUTATIONS

MIN_RESAMPLES = 20


def check(context: Context) -> None:
    """Raise `ConfigError` for a number out of range."""
    options = context.config.representation
    for name, least in (("images", 1), ("rows", 1), ("batch_size", 1), ("resamples", MIN_RESAMPLES)):
        if getattr(options, name) < least:
            msg = f"representation.{name}={getattr(options, name)}: must be at least {least}"
            raise ConfigError(msg)
    if not options.families:
        msg = f"representation.families is empty; choose from {', '.join(predictive_families)}"
        raise ConfigError(msg)
    for name in options.families:
        predictive_families[name]  # raises an error that names the allowed ones
    if 0 != options.permutations < PERMUTATIONS:
        msg = f"representation.permutations={options.permutations}: must be 0 or at least {PERMUTATIONS}"
        raise ConfigError(msg)


def make_representation(context: Context, root: Path) -> str:
    """Measure, and write the files; parts that the data or the model do not allow are named in them."""
    options = context.config.representation
    study = study_representation(
        context.model,
        context.discovery,
        context.store,
        images=options.images,
        rows=options.rows,
        families=options.families,
        permutations=options.permutations,
        resamples=options.resamples,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    study.save(root)
    violations = "no ceilings"
    if study.ceilings is not None:
        cells = study.ceilings.cells
        count = format_count(sum(cell.violated for cell in cells), "violated ceiling")
        violations = f"{count} of {len(cells)}"
    missing = f"; not measured: {', '.join(study.left_out)}" if study.left_out else ""
    measures = format_count(len(study.best), "measure")
    return f"{measures} of alignment, {format_count(len(study.paths), 'path')}, {violations}{missing}"
