"""Stage `report`: the page of the run."""

from __future__ import annotations

from pathlib import Path

from experiments.report.page import REPORT, write_report
from experiments.run.context import Context
from experiments.run.folder import write_json
from groundscope.core.text import format_count


def make_report(context: Context, root: Path) -> str:
    """Write ``report.html`` into the folder of the run, and the ids of its sections into the folder of the stage."""
    parts = write_report(context.folder.path)
    write_json(root / "sections.json", list(parts))
    size = (context.folder.path / REPORT).stat().st_size
    return f"{format_count(len(parts), 'section')}, {size / 1e6:.1f} MB"
