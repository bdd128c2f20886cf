"""The report of a run: one static HTML file that answers the four questions with figures and intervals."""

from experiments.report.page import make_report

__all__ = ["make_report"]
