"""A section of the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.results.run_files import RunFiles


@dataclass(frozen=True)
class Section:
    """A section of the report: what the navigation calls it, and the function that renders it.

    Examples
    --------
    >>> from experiments.report import html
    >>> from experiments.report.section import Section
    >>> data = Section("Data", lambda run: html.section("data", "Data", html.paragraph(run.headline)))
    >>> data.link
    'Data'
    """

    link: str
    render: Callable[[RunFiles], str]
    """Returns HTML from the files of a run (see `experiments.report.html`); empty if the run has nothing to show."""
    needs: tuple[str, ...] | None = None
    """Stages without which it is left out; None for all stages with results."""
