"""The report of a run: one static HTML file with figures and intervals; sections are an open table.

- `page`: write the report of a run folder
- `section`, `sections`: the sections, one module each, and the table that packages extend
- `derived`: numbers that several sections use
- `figures`, `html`: drawing and HTML
- `sweep`: the page of a sweep
- `browser_check`: check a page in Chromium
"""

from experiments.report.page import write_report
from experiments.report.section import Section
from experiments.report.sections import SECTIONS

__all__ = ["SECTIONS", "Section", "write_report"]
