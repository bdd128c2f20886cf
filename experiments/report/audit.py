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
    with_findings = [report for report in audit.causes if report.findings]
    without = [report.name for report in audit.causes if report.measured and not report.findings]
    parts = [
        paragraph(
            f"{format_count(audit.examples, 'question')} about {format_count(audit.images, 'image')} were searched for causes of "
            "errors in data; no model is needed for that. A finding is a reason to look at the data, not a proof of a fault."
        )
    ]
    if with_findings:
        rows = [
            [report.name, _title(report.name), len(report.findings), len(report.images), len(report.examples)]
            for report in with_findings
        ]
        parts.append(table(["cause", "what it is", "findings", "images", "questions"], rows))
    if without:
        parts.append(paragraph(f"Nothing found: {', '.join(without)}."))
    if errors:
        concerned = [errors[report.name] for report in audit.causes if report.name in errors]
        parts += [
            "<h3>Error rates by cause</h3>",
            table(
                ["cause", "wrong if concerned", "wrong otherwise", "difference in points"],
                [[e.cause, interval(e.concerned), interval(e.others), _difference(e.difference)] for e in concerned],
            ),
            paragraph(
                f"Error rates of {format_count(audit.answered, 'answer')} with 95 % intervals over images. A difference is an "
                "association: concerned questions can differ in other ways too. It stands out only if its interval excludes 0, "
                f"which happens by chance for some of {format_count(len(errors), 'cause')}.",
                soft=True,
            ),
        ]
    parts += [_findings(report) for report in with_findings]
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
    more = f" (the first {SHOWN}; all are in findings.csv)" if len(rows) > SHOWN else ""
    title = _title(report.name)
    return closed(
        f"audit-{report.name.replace(' ', '-')}",
        f"{title}: {format_count(len(rows), 'finding')}{more}",
        table(["finding", "images"], rows[:SHOWN]),
    )


def _title(cause: str) -> str:
    """Return what a cause is; causes of packages that are not installed have their name only."""
    return CAUSES[cause].title if cause in CAUSES else cause


def _difference(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return f"{100 * estimate.value:+.1f}"
    few = " (few images)" if estimate.few_groups else ""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}] {few}"
