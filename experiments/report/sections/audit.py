"""Causes of errors in the data of a run, if `groundscope audit` searched them."""

from __future__ import annotations

from behavior.data_audit import Audit
from experiments.report.audit import audit_html
from experiments.results.run_files import RunFiles
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file

FILE = "audit/audit.json"
"""The audit of a run, in its folder."""


def audit_section(run: RunFiles) -> str:
    """Return the section; empty for a run whose data were not audited."""
    file = below(run.root, FILE, error=ConfigError)
    return audit_html(Audit.load(file)) if is_file(file) else ""
