"""The report of a run: one HTML file without scripts, made from the run folder alone."""

from __future__ import annotations

from pathlib import Path

from experiments.config import DEFAULT_STAGES
from experiments.report.html import page
from experiments.report.sections import LAST, SECTIONS
from experiments.results.run_files import RunFiles
from groundscope.core.files import write_text

REPORT = "report.html"
"""Name of the file in the folder of a run."""


def write_report(folder: str | Path) -> dict[str, str]:
    """Write ``report.html`` into the folder of a run.

    Needs neither the model nor the data: the folder may be a copy on another machine. What a run of an earlier version did
    not store, such as copies of images, is left out with a sentence.

    Parameters
    ----------
    folder
        Folder of a run whose stages have finished.

    Returns
    -------
    dict
        HTML of each section by its id, in the order of the page.

    Raises
    ------
    ConfigError, StoreError
        If a file of the run is missing or damaged.
    """
    run = RunFiles(Path(folder))
    sections = SECTIONS.usable()
    order = [*(name for name in sections if name != LAST), LAST]
    every = {stage for stage in DEFAULT_STAGES if stage not in {"examples", "trace", "report"}}
    possible = [name for name in order if set(every if (n := sections[name].needs) is None else n) <= run.finished]
    parts = {name: html for name in possible if (html := sections[name].render(run))}
    title = run.config.report.title or f"groundscope: {run.config.model.path}"
    links = [(name, sections[name].link, html) for name, html in parts.items()]
    write_text(run.root / REPORT, page(title, run.headline, links))
    return parts
