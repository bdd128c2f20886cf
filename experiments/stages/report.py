"""Stage `report`: the page of the run."""

from __future__ import annotations

from pathlib import Path

from experiments.report import make_report as write_page
from experiments.run.context import Context


def make_report(context: Context, root: Path) -> str:
    """Write ``report.html`` into the folder of the run, and the names of its sections into the folder of the stage."""
    return write_page(context, root)
