"""Causes of errors in data: the section of a run's report, and a separate page."""

from __future__ import annotations

import math

from behavior.data_audit import CAUSES, Audit, CauseReport
from experiments.report.html import closed, interval, page, paragraph, section, table
from groundscope.core.statistics import Estimate
from groundscope.core.text import format_count

SHOWN = 20
"""Findings of a cause that are shown."""


def audit_html(audit: Audit) -> str:
    """Return the section about an audit.

    Examples
    --------
    >>> import groundscope as gs
    >>> from experiments.report.audit import audit_html
    >>> "small objects" in audit_html(gs.audit(gs.scenes.dataset(10), pixels=False))
    True
    """
    errors = {row.cause: row for row in audit.errors}
    head = ["cause", "findings", "images", "questions"]
    if errors:
        head += ["wrong, concerned", "wrong, others", "difference [95 %]"]
    rows = []
    for report in audit.causes:
        if not report.measured:
            continue
        row: list[object] = [report.name, len(report.findings), len(report.images), len(report.examples)]
        if errors:
            cause_errors = errors.get(report.name)
            row += (
                ["-"] * 3
                if cause_errors is None
                else [
                    interval(cause_errors.concerned),
                    interval(cause_errors.others),
                    _difference(cause_errors.difference),
                ]
            )
        rows.append(row)
    parts = [
        paragraph(
            f"{format_count(audit.examples, 'question')} about {format_count(audit.images, 'image')} were searched for causes of "
            "errors in data; no model is needed for that."
        ),
        table(head, rows),
    ]
    if errors:
        parts.append(
            paragraph(
                f"Error rates of {format_count(audit.answered, 'answer')} with 95 % intervals over images. A difference is an "
                "association: concerned questions can differ in other ways too. It stands out only if its interval excludes 0, "
                f"which happens by chance for some of {format_count(len(errors), 'cause')}.",
                soft=True,
            )
        )
    parts += [_findings(report) for report in audit.causes if report.findings]
    missing = [[report.name, report.reason] for report in audit.causes if not report.measured]
    if missing:
        parts.append(closed("audit-not-measured", "Not measured", table(["cause", "reason"], missing)))
    return section("audit", "Causes in data", *parts)


def audit_page(audit: Audit) -> str:
    """Return a page with the section alone.

    Examples
    --------
    >>> import groundscope as gs
    >>> from experiments.report.audit import audit_page
    >>> audit_page(gs.audit(gs.scenes.dataset(10), pixels=False)).startswith("<!doctype html>")
    True
    """
    return page(f"Audit of {audit.data}", "Causes of errors in data", [("audit", "Causes in data", audit_html(audit))])


def _findings(report: CauseReport) -> str:
    rows = [
        [f.message, ", ".join(f.images[:3]) + (f" and {len(f.images) - 3} more" if len(f.images) > 3 else "")]
        for f in report.findings
    ]
    more = f" (the first {SHOWN})" if len(rows) > SHOWN else ""
    title = CAUSES[report.name].title if report.name in CAUSES else report.name
    return closed(
        f"audit-{report.name.replace(' ', '-')}",
        f"{title}: {format_count(len(rows), 'finding')}{more}",
        table(["finding", "images"], rows[:SHOWN]),
    )


def _difference(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return f"{100 * estimate.value:+.1f} points"
    few = " (few images)" if estimate.few_groups else ""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}] points{few}"
